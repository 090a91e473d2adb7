pub mod event;
pub mod intake;
