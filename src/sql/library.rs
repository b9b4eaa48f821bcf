//! The facts of the fingerprints seen lately.

use std::rc::Rc;

use hashbrown::HashMap;

use super::effects::EffectSet;
use super::facts::Facts;
use super::fingerprint::Fingerprint;

/// Bytes of fingerprints in one generation, at most, an entry counted as [`ENTRY`] more.
const GENERATION_MAX: usize = 512 * 1024;
const ENTRY: usize = 256;

/// Longer texts are unknown; bytes. No fingerprint is made of them.
const TEXT_MAX: usize = 64 * 1024;

type Generation = HashMap<Box<[u8]>, Rc<Facts>, foldhash::fast::RandomState>;

/// Facts by fingerprint, bounded: when the young generation is full it becomes the old one, and what was old is
/// forgotten. What is asked for stays young.
#[derive(Debug, Default)]
pub struct Library {
    young: Generation,
    old: Generation,
    bytes: usize,
    /// Texts whose facts were there.
    pub found: u64,
    /// Texts that the grammar was asked about.
    pub parsed: u64,
    /// Room for the fingerprint of the text at hand.
    room: Fingerprint,
    /// Room for its letters.
    lower: Vec<u8>,
}

/// What is known of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The facts of its fingerprint.
    pub facts: Rc<Facts>,
    /// What it may do to its session, its literals read.
    pub set: EffectSet,
    /// It asks for a setting that may be the server's own.
    pub asks_server: bool,
}

impl Library {
    /// `text`, its ASCII letters in lower case.
    pub fn in_lower_case(&mut self, text: &[u8]) -> &[u8] {
        self.lower.clear();
        self.lower.extend_from_slice(text);
        self.lower.make_ascii_lowercase();
        &self.lower
    }

    /// Shows what is known of `text`, for every value of `standard_conforming_strings` that makes a difference to it; one
    /// reading if it makes none. An unreadable text has [`Facts::unknown`]. Allocates nothing for what is known.
    pub fn each(&mut self, text: &[u8], mut see: impl FnMut(&Reading)) {
        let both = memchr::memchr(b'\\', text).is_some();
        let ways: &[bool] = if both { &[false, true] } else { &[false] };
        let mut is_read = false;
        for reading in ways.iter().filter_map(|escapes| self.one(text, *escapes)) {
            see(&reading);
            is_read = true;
        }
        if !is_read {
            let facts = Facts::unknown();
            see(&Reading { set: facts.set, facts: Rc::new(facts), asks_server: true });
        }
    }

    /// The same, all at once.
    #[cfg(test)]
    pub fn read(&mut self, text: &[u8]) -> Vec<Reading> {
        let mut readings = Vec::new();
        self.each(text, |reading| readings.push(reading.clone()));
        readings
    }

    /// Bytes of all that is kept, about.
    #[cfg(all(test, feature = "grammar"))]
    pub(super) fn size(&self) -> usize {
        self.young.keys().chain(self.old.keys()).map(|tokens| tokens.len() + ENTRY).sum()
    }

    fn one(&mut self, text: &[u8], escapes: bool) -> Option<Reading> {
        if text.len() > TEXT_MAX {
            return None;
        }
        let mut fingerprint = std::mem::take(&mut self.room);
        let reading = fingerprint.take(text, escapes).then(|| self.known(text, escapes, &fingerprint)).flatten();
        self.room = fingerprint;
        reading
    }

    fn known(&mut self, text: &[u8], escapes: bool, fingerprint: &Fingerprint) -> Option<Reading> {
        let facts = match self.find(&fingerprint.tokens) {
            Some(facts) => {
                self.found += 1;
                facts
            }
            None => self.learn(text, escapes, fingerprint)?,
        };
        let set = facts.effects(text, &fingerprint.literals);
        let asks_server = facts.asks_server(text, &fingerprint.literals);
        Some(Reading { facts, set, asks_server })
    }

    fn find(&mut self, tokens: &[u8]) -> Option<Rc<Facts>> {
        if let Some(facts) = self.young.get(tokens) {
            return Some(facts.clone());
        }
        let (tokens, facts) = self.old.remove_entry(tokens)?;
        self.keep(tokens, facts.clone());
        Some(facts)
    }

    #[cold]
    fn learn(&mut self, text: &[u8], escapes: bool, fingerprint: &Fingerprint) -> Option<Rc<Facts>> {
        self.parsed += 1;
        let facts = Rc::new(parse(text, escapes, fingerprint)?);
        self.keep(fingerprint.tokens.as_slice().into(), facts.clone());
        Some(facts)
    }

    fn keep(&mut self, tokens: Box<[u8]>, facts: Rc<Facts>) {
        let bytes = tokens.len() + ENTRY;
        if self.bytes + bytes > GENERATION_MAX {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
        self.bytes += bytes;
        self.young.insert(tokens, facts);
    }
}

#[cfg(feature = "grammar")]
fn parse(text: &[u8], escapes: bool, fingerprint: &Fingerprint) -> Option<Facts> {
    super::grammar::facts(text, escapes, &fingerprint.literals)
}

/// Without the grammar nothing is known.
#[cfg(not(feature = "grammar"))]
fn parse(_: &[u8], _: bool, _: &Fingerprint) -> Option<Facts> {
    None
}
