//! Texts that end an answer when they appear in it.
//!
//! Invariant: nothing of a stop text is ever handed out, however it is cut into pieces; what
//! might become one is held back until it cannot.

/// Watches an answer that arrives in pieces.
#[derive(Debug, Clone, Default)]
pub struct StopTexts {
    texts: Vec<String>,
    /// The end of what arrived, as long as it may begin a stop text.
    held: String,
    stopped: bool,
}

impl StopTexts {
    /// Stops at the first of these texts. Empty ones never appear.
    pub fn new(texts: impl IntoIterator<Item = String>) -> Self {
        let texts = texts.into_iter().filter(|text| !text.is_empty()).collect();
        Self { texts, ..Self::default() }
    }

    /// Takes a piece and gives what may be shown. After a stop text nothing is.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        if self.texts.is_empty() {
            return piece.to_owned();
        }
        let mut text = std::mem::take(&mut self.held) + piece;
        if let Some(at) = self.texts.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            self.stopped = true;
            text.truncate(at);
            return text;
        }
        let open = |at: &usize| self.texts.iter().any(|stop| stop.starts_with(&text[*at..]));
        let longest = self.texts.iter().map(String::len).max().unwrap_or(0);
        let from = text.len().saturating_sub(longest);
        let held = (from..text.len()).filter(|at| text.is_char_boundary(*at)).find(open);
        if let Some(at) = held {
            self.held = text.split_off(at);
        }
        text
    }

    /// Whether a stop text appeared.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back. Call it after the last piece.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut stop = StopTexts::new(stops.iter().map(|s| (*s).to_owned()));
        let mut out: Vec<_> = pieces.iter().map(|piece| stop.push(piece)).collect();
        out.push(stop.finish());
        (out, stop.stopped())
    }

    #[test]
    fn nothing_of_a_stop_text_is_shown_however_it_is_cut() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
        let all = "one STOP two";
        for cut in 0..=all.len() {
            for second in cut..=all.len() {
                let pieces = [&all[..cut], &all[cut..second], &all[second..]];
                let (shown, stopped) = run(&["STOP"], &pieces);
                assert_eq!((shown.concat().as_str(), stopped), ("one ", true), "{pieces:?}");
            }
        }
    }

    #[test]
    fn what_only_looked_like_one_is_shown_after_all() {
        let (shown, stopped) = run(&["STOP", ""], &["ST", "AY ST", "O"]);
        assert_eq!(
            (shown, stopped),
            (vec!["".into(), "STAY ".into(), "".into(), "STO".into()], false)
        );
        let (shown, _) = run(&["aab"], &["a", "a", "a", "b", "x"]);
        assert_eq!(shown.concat(), "a");
        let (shown, _) = run(&["éé", "b"], &["é", "c", "é", "b"]);
        assert_eq!(shown.concat(), "écé");
        let (shown, _) = run(&["cd", "bc"], &["abcd"]);
        assert_eq!(shown.concat(), "a", "the first to begin counts");
    }
}
