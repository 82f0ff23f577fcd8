//! An error and everything it came from, as text.

use std::error::Error;

/// What it came from, nearest first.
fn of<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |cause: &&'a (dyn Error + 'static)| (*cause).source())
}

/// The error and all its causes in one line.
pub fn in_one_line(error: &(dyn Error + 'static)) -> String {
    of(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The error, and each cause on a line of its own, for a person at a terminal.
pub fn line_by_line(error: &(dyn Error + 'static)) -> String {
    of(error).fold(error.to_string(), |text, cause| format!("{text}\n  because: {cause}"))
}
