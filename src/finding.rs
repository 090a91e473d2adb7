//! What became of one thing that `check` looked at.

#[derive(Debug)]
pub(crate) enum Finding {
    Fine(String),
    /// Works, but the reader should know.
    Note(String),
    /// With the way out.
    Wrong(String),
}
