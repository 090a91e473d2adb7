pub mod event;
pub mod queue;
