//! Answers of a form: a JSON schema, a regular expression or a grammar decides which tokens may come
//! next, by the `llguidance` library.
//!
//! Invariants: what may come next is a function of the grammar, the vocabulary and the tokens before,
//! so that a sequence that goes on elsewhere has the same; a grammar that asks for too much, or a
//! fault of the library, is an error of its own request; no clock, no file and no network is looked
//! at: a schema that refers to another place is refused; what is read once is kept, in bounds.

use std::{collections::VecDeque, sync::Arc};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use parking_lot::Mutex;

use crate::tokenizer::Tokenizer;

/// Longest grammar, in bytes.
pub const GRAMMAR_BYTES_MAX: usize = 128 << 10;
/// Grammars that are kept ready, and bytes of their texts.
const READY_MAX: usize = 16;
const READY_BYTES_MAX: usize = 1 << 20;
/// As much of what the library says as people read.
const SAID_BYTES_MAX: usize = 600;

/// The form of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// JSON that this schema describes.
    JsonSchema(String),
    /// All of it matches this regular expression.
    Regex(String),
    /// It is of this language, in the library's dialect of Lark.
    Lark(String),
}

impl Grammar {
    fn text(&self) -> &str {
        let (Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text)) = self;
        text
    }
}

/// A grammar that cannot be used, or whose answer went where it may not go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("grammar: {0}")]
pub struct GrammarError(String);

fn failed(error: impl std::fmt::Display) -> GrammarError {
    let mut text = error.to_string();
    text.truncate(text.floor_char_boundary(SAID_BYTES_MAX));
    GrammarError(text)
}

/// What one grammar may cost: an eighth of a second of reading it, some milliseconds of a token, and
/// 64 MiB. Counted in steps of the library, not by a clock.
fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        max_lexer_states: 32_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        // Errors are not to hold the answer so far.
        verbose_errors: false,
    }
}

/// Makes grammars of one vocabulary ready to use.
pub struct Grammars {
    factory: ParserFactory,
    ends: Arc<[u32]>,
    /// The last ones that were read, with their beginnings.
    ready: Mutex<VecDeque<(Grammar, Guide)>>,
}

impl Grammars {
    /// For a model of `vocab` tokens, of which these end a text: one at least.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, ends: &[u32]) -> Result<Self, GrammarError> {
        let Some(&end) = ends.first() else {
            return Err(GrammarError("this model has no token that ends a text".into()));
        };
        let words: Vec<Vec<u8>> = (0..vocab as u32)
            .map(|id| match tokenizer.bytes(id) {
                // Nothing that is written can be one of these.
                None => Vec::new(),
                Some(bytes) if ends.contains(&id) || tokenizer.is_special(id) => {
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat()
                }
                Some(bytes) => bytes,
            })
            .collect();
        let info = TokRxInfo::new(vocab as u32, end);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&environment).map_err(failed)?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, ends: ends.into(), ready: Mutex::default() })
    }

    /// Reads a grammar, or finds it among those that were. This takes its time: it is not for a thread
    /// that others wait for.
    pub fn read(&self, grammar: &Grammar) -> Result<Guide, GrammarError> {
        self.ready(grammar, Guide::clone)
    }

    /// The same for whoever only wants to know whether it can be used.
    pub fn check(&self, grammar: &Grammar) -> Result<(), GrammarError> {
        self.ready(grammar, |_| ())
    }

    fn ready<T>(&self, grammar: &Grammar, of: impl Fn(&Guide) -> T) -> Result<T, GrammarError> {
        let bytes = grammar.text().len();
        if bytes > GRAMMAR_BYTES_MAX {
            let message = format!("it has {bytes} bytes; at most {GRAMMAR_BYTES_MAX} are taken");
            return Err(GrammarError(message));
        }
        if let Some(found) = self.find(grammar, &of) {
            return Ok(found);
        }
        let top = match grammar {
            Grammar::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(failed)?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        // The library keeps its own panics, but not those of reading a grammar.
        let made = std::panic::AssertUnwindSafe(|| self.factory.create_parser(top));
        let parser = std::panic::catch_unwind(made)
            .map_err(|_| GrammarError("the library gave up on it".into()))?
            .map_err(failed)?;
        let mut guide = Guide { matcher: Matcher::new(Ok(parser)), ends: self.ends.clone() };
        // What is wrong with it shows when it is first asked.
        guide.mask()?;
        let found = of(&guide);
        self.keep(grammar, guide);
        Ok(found)
    }

    fn find<T>(&self, grammar: &Grammar, of: impl Fn(&Guide) -> T) -> Option<T> {
        let mut ready = self.ready.lock();
        let at = ready.iter().position(|(other, _)| other == grammar)?;
        let found = ready.remove(at)?;
        let of_it = of(&found.1);
        ready.push_back(found);
        Some(of_it)
    }

    fn keep(&self, grammar: &Grammar, guide: Guide) {
        let mut ready = self.ready.lock();
        ready.push_back((grammar.clone(), guide));
        let mut bytes: usize = ready.iter().map(|(grammar, _)| grammar.text().len()).sum();
        while ready.len() > READY_MAX || bytes > READY_BYTES_MAX {
            let Some((oldest, _)) = ready.pop_front() else { return };
            bytes -= oldest.text().len();
        }
    }
}

/// Where an answer is in its grammar.
pub struct Guide {
    matcher: Matcher,
    ends: Arc<[u32]>,
}

impl Clone for Guide {
    /// One that shares nothing with this: what one answer costs is not another's.
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), ends: self.ends.clone() }
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").field("over", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

/// Tokens that may come next. Where the answer may end, all tokens that end it are among them.
#[derive(Debug)]
pub struct Mask(llguidance::toktrie::SimpleVob);

impl Mask {
    /// Whether a token is one of them.
    pub fn allows(&self, id: u32) -> bool {
        (id as usize) < self.0.len() && self.0.is_allowed(id)
    }
}

impl Guide {
    /// Which tokens may come next.
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let mut allowed = self.matcher.compute_mask_or_eos().map_err(failed)?;
        // The library knows the first of them only.
        let (count, ends) = (allowed.len(), self.ends.iter().map(|id| *id as usize));
        let mut ends = ends.filter(|id| *id < count);
        if let Some(first) = ends.next() {
            let over = allowed.get(first);
            ends.for_each(|id| allowed.set(id, over));
        }
        Ok(Mask(allowed))
    }

    /// A token came. After one that ends the text nothing is looked at.
    pub fn take(&mut self, id: u32) -> Result<(), GrammarError> {
        if self.ends.contains(&id) || self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(failed)
    }

    /// How many of these tokens, from the first, could come.
    ///
    /// The library looks at them with the fuel that its last mask has left, and one that runs out stays
    /// in error. So they are looked at aside: a guess neither fails an answer nor saves it.
    pub fn possible(&self, ids: &[u32]) -> usize {
        // One that ends the text is not worth a guess.
        let words = ids.iter().position(|id| self.ends.contains(id)).unwrap_or(ids.len());
        match words == 0 || self.matcher.is_stopped() {
            true => 0,
            false => self.matcher.deep_clone().validate_tokens(&ids[..words]).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 0;

    /// Bytes, and some words of more, as the demo's tokenizer has them.
    fn tokenizer() -> Tokenizer {
        let vocab: serde_json::Map<String, serde_json::Value> = [("<end>".to_owned(), 0)]
            .into_iter()
            .chain((1..127).map(|id| (crate::tokenizer::byte_char(id).to_string(), id)))
            .chain([("true".to_owned(), 127), ("{\"".to_owned(), 128)])
            .map(|(word, id)| (word, id.into()))
            .collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 0, "content": "<end>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            }],
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "vocab": vocab, "merges": [] },
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    fn grammars() -> Grammars {
        Grammars::new(&tokenizer(), 129, &[END]).unwrap()
    }

    /// The text of a walk that takes the first (or last) allowed token each time, and whether it
    /// ended.
    fn walk(guide: &mut Guide, last: bool, most: usize) -> (String, bool) {
        let tokenizer = tokenizer();
        let mut ids = Vec::new();
        for _ in 0..most {
            let mask = guide.mask().unwrap();
            let mut allowed = (0..129).filter(|id| mask.allows(*id));
            let next = if last { allowed.next_back() } else { allowed.next() }.unwrap();
            if next == END {
                return (tokenizer.decode(&ids), true);
            }
            guide.take(next).unwrap();
            ids.push(next);
        }
        (tokenizer.decode(&ids), false)
    }

    #[test]
    fn an_answer_has_its_form_and_ends_when_that_is_whole() {
        let grammars = grammars();
        let regex = Grammar::Regex("(ab|cd)+;".into());
        let (text, ended) = walk(&mut grammars.read(&regex).unwrap(), true, 9);
        assert!(!ended && text.starts_with("cd"), "{text}");
        let schema = serde_json::json!({
            "type": "object", "properties": { "a": { "enum": [true] } }, "required": ["a"],
            "additionalProperties": false,
        });
        let schema = Grammar::JsonSchema(schema.to_string());
        let (text, ended) = walk(&mut grammars.read(&schema).unwrap(), true, 99);
        let found: serde_json::Value = serde_json::from_str(&text).expect(&text);
        assert_eq!((found, ended), (serde_json::json!({ "a": true }), true), "{text}");
        let lark = Grammar::Lark("start: \"x\" \"y\"".into());
        assert_eq!(walk(&mut grammars.read(&lark).unwrap(), false, 9), ("xy".into(), true));
    }

    #[test]
    fn what_is_kept_is_as_it_was_read_and_bounded() {
        let grammars = grammars();
        let regex = Grammar::Regex("[a-c]{3}".into());
        let mut first = grammars.read(&regex).unwrap();
        let whole = walk(&mut first, false, 9);
        assert_eq!(walk(&mut grammars.read(&regex).unwrap(), false, 9), whole, "at its beginning");
        assert_eq!(grammars.ready.lock().len(), 1);
        for number in 0..READY_MAX + 9 {
            grammars.read(&Grammar::Regex(format!("a{{{}}}", number + 1))).unwrap();
        }
        assert_eq!(grammars.ready.lock().len(), READY_MAX);
        // A sequence that goes on elsewhere is where it was.
        let mut here = grammars.read(&regex).unwrap();
        let (a, b) = (u32::from(b'a'), u32::from(b'b'));
        here.take(a).unwrap();
        here.take(b).unwrap();
        let mut there = grammars.read(&regex).unwrap();
        [a, b].into_iter().for_each(|id| there.take(id).unwrap());
        let (here, there) = (here.mask().unwrap(), there.mask().unwrap());
        assert!((0..129).all(|id| here.allows(id) == there.allows(id)));
        assert!(here.allows(a) && !here.allows(END));
    }

    #[test]
    fn guesses_are_cut_where_the_form_ends_them() {
        let grammars = grammars();
        let mut guide = grammars.read(&Grammar::Regex("[ab]{3}".into())).unwrap();
        let [a, b, x] = [b'a', b'b', b'x'].map(u32::from);
        assert_eq!(guide.possible(&[a, b, x, a]), 2);
        assert_eq!(guide.possible(&[a, END]), 1);
        assert_eq!(guide.possible(&[x]), 0);
        assert!(guide.take(x).is_err());
    }

    /// Fuel that lasts for the answer alone lasts for it with guesses, too, whatever those would take.
    #[test]
    fn a_guess_does_not_take_the_fuel_of_its_answer() {
        // What follows the guessed way has states by the thousand.
        let regex = Grammar::Regex("x(y{9}|[a-c]*[ab][a-c]{14}z)".into());
        let [x, y, a] = [b'x', b'y', b'a'].map(u32::from);
        let guess: Vec<u32> = (0..60).map(|at| a + at * at % 3).collect();
        let answered = |fuel: u64, guessed: bool| -> Result<(), GrammarError> {
            let mut grammars = grammars();
            grammars.factory.limits_mut().step_lexer_fuel = fuel;
            let mut guide = grammars.read(&regex)?;
            for id in [x, y, y, y] {
                if guessed {
                    guide.possible(&guess);
                }
                guide.mask()?;
                guide.take(id)?;
            }
            guide.mask().map(drop)
        };
        let enough = (4..).map(|power| 1 << power).find(|fuel| answered(*fuel, false).is_ok());
        assert_eq!(answered(enough.unwrap(), true), Ok(()));
    }

    #[test]
    fn every_token_that_ends_a_text_ends_an_answer_of_a_form() {
        let ends = [END, u32::from(b'#'), 4000];
        let grammars = Grammars::new(&tokenizer(), 129, &ends).unwrap();
        let mut guide = grammars.read(&Grammar::Regex("ab?".into())).unwrap();
        let allowed = |guide: &mut Guide| {
            let mask = guide.mask().unwrap();
            ends.map(|id| mask.allows(id))
        };
        assert_eq!(allowed(&mut guide), [false; 3]);
        guide.take(u32::from(b'a')).unwrap();
        assert_eq!(allowed(&mut guide), [true, true, false], "the last is no token of it");
        grammars.check(&Grammar::Regex("ab?".into())).unwrap();
        assert!(grammars.check(&Grammar::Regex("(".into())).is_err());
    }

    #[test]
    fn what_cannot_be_used_is_an_error_that_says_why() {
        let grammars = grammars();
        for bad in [
            Grammar::Regex("(".into()),
            Grammar::Lark("start: nothing_here".into()),
            Grammar::JsonSchema("{".into()),
            Grammar::JsonSchema("{\"type\": \"wizard\"}".into()),
            Grammar::JsonSchema("{\"$ref\": \"https://evil.example/schema\"}".into()),
            Grammar::Regex("a".repeat(GRAMMAR_BYTES_MAX + 1)),
        ] {
            let error = grammars.read(&bad).err().unwrap_or_else(|| panic!("{bad:?}")).to_string();
            assert!(error.starts_with("grammar: ") && error.len() < 700, "{error}");
        }
        assert!(Grammars::new(&tokenizer(), 129, &[]).is_err(), "nothing could end it");
        // Whatever comes of it, it comes soon.
        let begun = std::time::Instant::now();
        let _ = grammars.read(&Grammar::Regex("((((a{1,99}b?){1,99}){1,99}){1,99}){1,99}".into()));
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    }
}
