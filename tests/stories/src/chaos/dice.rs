//! Randomness that can be had again: a seed and a name give the same throws every time.

/// `SplitMix64`; good enough to choose by, and the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    /// Dice of their own for everybody who throws some.
    pub(crate) fn new(seed: u64, thrower: &str) -> Self {
        let mixed = thrower.bytes().fold(seed, |mixed, byte| {
            let mut dice = Self(mixed ^ u64::from(byte));
            dice.next()
        });
        Self(mixed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to and without `end`; 0 when there is nothing to choose from.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next().checked_rem(end).unwrap_or(0)
    }

    /// Yes, so often in a hundred.
    pub(crate) fn percent(&mut self, often: u64) -> bool {
        self.below(100) < often
    }

    /// One of them.
    pub(crate) fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        let index = self.below(u64::try_from(all.len()).ok()?);
        all.get(usize::try_from(index).ok()?)
    }

    /// One of them, the more likely the greater its weight.
    pub(crate) fn weighted<T: Copy>(&mut self, all: &[(u64, T)]) -> Option<T> {
        let mut left = self.below(all.iter().map(|(weight, _)| weight).sum());
        for (weight, what) in all {
            match left.checked_sub(*weight) {
                Some(rest) => left = rest,
                None => return Some(*what),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_throws_again_and_each_thrower_others() {
        let throws = |seed, thrower: &str| {
            let mut dice = Dice::new(seed, thrower);
            (0..20).map(|_| dice.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(throws(7, "a"), throws(7, "a"));
        assert!(throws(7, "a") != throws(8, "a") && throws(7, "a") != throws(7, "b"));
    }

    #[test]
    fn what_weighs_nothing_is_never_chosen() {
        let mut dice = Dice::new(1, "");
        let chosen: Vec<char> = (0..200).filter_map(|_| dice.weighted(&[(0, 'a'), (1, 'b'), (3, 'c')])).collect();
        assert!(chosen.len() == 200 && chosen.contains(&'b') && chosen.contains(&'c') && !chosen.contains(&'a'));
        assert_eq!(dice.weighted::<char>(&[]), None);
    }
}
