//! The known name that is most like a misspelt one.

/// The one of `known` whose `compared` text is most like `name`, when it is like it at all.
pub(super) fn nearest<'k>(
    name: &str,
    known: impl Iterator<Item = &'k str>,
    compared: impl Fn(&'k str) -> &'k str,
) -> Option<&'k str> {
    /// Similarity from which a name is taken for a typing error.
    const NEAR: f64 = 0.6;
    known
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, compared(candidate)), candidate))
        .filter(|(similarity, _)| *similarity >= NEAR)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}
