//! Chances and log odds, from tables that are computed with + − × ÷ alone: the same bits on every
//! machine.

const STEPS: usize = 4096;
/// One unit of an input: a fortieth of half the log odds.
pub(super) const UNIT: f32 = 1.0 / 40.0;

/// Both curves, by 4096 steps.
#[derive(Debug)]
pub(super) struct Curves {
    odds: Vec<i8>,
    chance: Vec<f32>,
}

impl Curves {
    pub(super) fn new() -> Curves {
        // Four terms of the series at x / 1024, squared ten times.
        let exp = |x: f64| {
            let y = x / 1024.0;
            let mut r = 1.0 + y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0)));
            for _ in 0..10 {
                r *= r;
            }
            r
        };
        let at = |i: usize| (i as f64 + 0.5) / 256.0 - 8.0;
        let chance: Vec<f32> = (0..STEPS).map(|i| (1.0 / (1.0 + exp(-at(i)))) as f32).collect();
        let mut x = 0;
        let odds = (0..STEPS).map(|i| {
            while x + 1 < STEPS && chance[x] < (i as f32 + 0.5) / STEPS as f32 {
                x += 1;
            }
            (at(x).clamp(-6.2, 6.2) * 0.5 / UNIT as f64) as i8
        });
        Curves { odds: odds.collect(), chance }
    }
    /// Half the log odds of a chance, in units.
    #[inline]
    pub(super) fn odds(&self, chance: f32) -> i8 {
        self.odds[((chance * STEPS as f32) as usize).min(STEPS - 1)]
    }
    /// The same of a chance in 65,536ths.
    #[inline]
    pub(super) fn odds_of_16_bits(&self, chance: u16) -> i8 {
        self.odds[(chance >> 4) as usize]
    }
    /// The chance of some log odds.
    #[inline]
    pub(super) fn chance(&self, odds: f32) -> f32 {
        self.chance[(((odds + 8.0) * 256.0).max(0.0) as usize).min(STEPS - 1)]
    }
}
