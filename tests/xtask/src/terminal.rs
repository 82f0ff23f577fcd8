//! What the person at the terminal sees: numbered steps with times, the work of the moment on one line that is redrawn, and
//! plain lines where nobody looks at a terminal.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stack::Watch;

/// How often the work of the moment is written where lines can't be redrawn.
const PLAIN_EVERY: Duration = Duration::from_secs(20);
/// How often it is redrawn at most.
const REDRAW_EVERY: Duration = Duration::from_millis(80);

/// Standard output, drawn by one hand.
#[derive(Debug)]
pub(crate) struct Terminal {
    live: bool,
    colour: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    begun: Instant,
    step_begun: Instant,
    drawn: Instant,
    on_screen: bool,
    steps: usize,
    step: String,
}

/// How a piece of text is meant.
#[derive(Debug, Clone, Copy)]
enum Ink {
    Strong,
    Faint,
    Good,
    Bad,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let live = std::io::stdout().is_terminal() && std::env::var_os("CI").is_none();
        let colour =
            live && std::env::var_os("NO_COLOR").is_none() && std::env::var("TERM").is_ok_and(|term| term != "dumb");
        let now = Instant::now();
        let state = State { begun: now, step_begun: now, drawn: now, on_screen: false, steps: 0, step: String::new() };
        Self { live, colour, state: Mutex::new(state) }
    }

    /// A headline.
    pub(crate) fn title(&self, text: &str) {
        let mut state = self.state();
        Self::clear(&mut state);
        println!("{}", self.ink(Ink::Strong, text));
    }

    /// A step begins.
    pub(crate) fn step(&self, what: &str) {
        let mut state = self.state();
        Self::clear(&mut state);
        state.steps += 1;
        what.clone_into(&mut state.step);
        state.step_begun = Instant::now();
        state.drawn = state.step_begun;
        println!("{}", self.ink(Ink::Strong, &format!("{:>2}  {what}", state.steps)));
    }

    /// The step is done; `result` is what came of it.
    pub(crate) fn done(&self, result: &str) -> Duration {
        let mut state = self.state();
        Self::clear(&mut state);
        let took = state.step_begun.elapsed();
        println!("    {} {result}  {}", self.ink(Ink::Good, "✓"), self.ink(Ink::Faint, &shown(took)));
        took
    }

    /// The step has failed.
    pub(crate) fn failed(&self, why: &str) -> Duration {
        let mut state = self.state();
        Self::clear(&mut state);
        let took = state.step_begun.elapsed();
        let what = match state.steps {
            0 => format!("failed after {}", shown(took)),
            number => format!("step {number} ({}) failed after {}", state.step, shown(took)),
        };
        println!("    {} {}", self.ink(Ink::Bad, "✗"), self.ink(Ink::Bad, &what));
        println!("      {}", indented(why));
        took
    }

    /// The end of somebody's log.
    pub(crate) fn log(&self, name: &str, text: &str) {
        let mut state = self.state();
        Self::clear(&mut state);
        println!("\n{}", self.ink(Ink::Strong, &format!("--- {name}")));
        println!("{}", if text.trim().is_empty() { "(empty)" } else { text.trim_end() });
    }

    /// Anything else worth keeping, as it is.
    pub(crate) fn line(&self, text: &str) {
        let mut state = self.state();
        Self::clear(&mut state);
        println!("{text}");
    }

    /// Since this terminal was opened.
    pub(crate) fn elapsed(&self) -> Duration {
        self.state().begun.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear(state: &mut State) {
        if state.on_screen {
            print!("\r\x1b[2K");
            state.on_screen = false;
        }
    }

    fn ink(&self, ink: Ink, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match ink {
            Ink::Strong => "1",
            Ink::Faint => "2",
            Ink::Good => "32",
            Ink::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

impl Watch for Terminal {
    fn say(&self, line: &str) {
        let mut state = self.state();
        Self::clear(&mut state);
        let at = shown(state.step_begun.elapsed());
        println!("    {} {line}", self.ink(Ink::Faint, &format!("{at:>7}")));
    }

    fn now(&self, text: &str) {
        let mut state = self.state();
        let every = if self.live { REDRAW_EVERY } else { PLAIN_EVERY };
        if text.is_empty() || state.drawn.elapsed() < every {
            return;
        }
        state.drawn = Instant::now();
        let at = shown(state.step_begun.elapsed());
        let text: String = text.chars().filter(|letter| !letter.is_control()).take(100).collect();
        if self.live {
            Self::clear(&mut state);
            print!("    {}", self.ink(Ink::Faint, &format!("{at:>7} {text}")));
            state.on_screen = true;
        } else {
            println!("    {at:>7} … {text}");
        }
        // A terminal that is gone is nothing to stop for.
        drop(std::io::stdout().flush());
    }
}

/// `820 ms`, `3.4 s`, `2 min 5 s`.
pub(crate) fn shown(time: Duration) -> String {
    match time.as_millis() {
        ms @ 0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", time.as_secs_f64()),
        _ => format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60),
    }
}

fn indented(text: &str) -> String {
    text.trim_end().replace('\n', "\n      ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_people_say_them() {
        let shown = |ms| shown(Duration::from_millis(ms));
        assert_eq!([shown(0), shown(999), shown(3_449), shown(125_000)], ["0 ms", "999 ms", "3.4 s", "2 min 5 s"]);
    }
}
