//! What to write of what was read: consecutive messages that pass unchanged are one range of the input;
//! everything else is copied.

use std::ops::Range;

/// A decision about a stretch of input: copied and made bytes first, then one untouched range.
///
/// Dropping, inserting or replacing a message closes the range: what it held is copied to `made`. So a stretch
/// in which everything passes is written from where it was read, and the others cost one copy.
#[derive(Debug)]
pub struct Plan<'a> {
    input: &'a [u8],
    made: &'a mut Vec<u8>,
    run: Range<usize>,
}

impl<'a> Plan<'a> {
    /// Nothing decided yet. `made` is emptied.
    pub fn new(input: &'a [u8], made: &'a mut Vec<u8>) -> Self {
        made.clear();
        Self { input, made, run: 0..0 }
    }

    /// Where in the input the next decision begins.
    #[must_use]
    #[inline]
    pub fn at(&self) -> usize {
        self.run.end
    }

    /// What is still undecided.
    #[must_use]
    #[inline]
    pub fn rest(&self) -> &'a [u8] {
        self.input.get(self.run.end..).unwrap_or_default()
    }

    /// The next `len` bytes pass.
    #[inline]
    pub fn forward(&mut self, len: usize) {
        self.run.end = (self.run.end + len).min(self.input.len());
    }

    /// The next `len` bytes are left out.
    pub fn skip(&mut self, len: usize) {
        self.close();
        let at = (self.run.end + len).min(self.input.len());
        self.run = at..at;
    }

    /// Nothing of what was decided so far is to be written.
    pub fn forget(&mut self) {
        self.made.clear();
        self.run.start = self.run.end;
    }

    /// Bytes to be written so far.
    #[must_use]
    pub fn planned(&self) -> usize {
        self.made.len() + self.run.len()
    }

    /// Bytes that were not in the input.
    pub fn insert(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.close();
        write(self.made);
    }

    /// The two slices to write, in this order.
    #[must_use]
    pub fn slices(&self) -> (&[u8], &'a [u8]) {
        (self.made, self.input.get(self.run.clone()).unwrap_or_default())
    }

    fn close(&mut self) {
        self.made.extend_from_slice(self.input.get(self.run.clone()).unwrap_or_default());
        self.run.start = self.run.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_stays_where_it_is() {
        let mut made = vec![9];
        let mut plan = Plan::new(b"abcdef", &mut made);
        plan.forward(2);
        plan.forward(1);
        assert_eq!(plan.slices(), (&b""[..], &b"abc"[..]));
        plan.skip(1);
        plan.insert(|out| out.push(b'X'));
        plan.forward(2);
        assert_eq!(plan.slices(), (&b"abcX"[..], &b"ef"[..]));
        assert_eq!((plan.at(), plan.rest(), plan.planned()), (6, &b""[..], 6));
    }

    #[test]
    fn lengths_beyond_the_input_are_cut() {
        let mut made = Vec::new();
        let mut plan = Plan::new(b"ab", &mut made);
        plan.forward(5);
        plan.skip(5);
        assert_eq!(plan.slices(), (&b"ab"[..], &b""[..]));
    }
}
