//! How the stack says what it is doing, without knowing whether a person, a log or nobody reads it.

/// Whoever follows the work.
pub trait Watch: Send + Sync {
    /// One line worth keeping.
    fn say(&self, line: &str);

    /// What is happening this moment; each text replaces the one before, and none is worth keeping.
    fn now(&self, text: &str);
}

/// Nobody watches.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn say(&self, _line: &str) {}
    fn now(&self, _text: &str) {}
}
