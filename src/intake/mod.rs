//! How events come in.

pub mod claude_code;
mod json;
mod salvage;
