//! How far the early gate is to be trusted.
//!
//! The gate of the next layer, asked one layer early, names experts, the likeliest first. How often
//! those of each place in its list were then used is an average of its own.

/// Places of a list that are told apart; a longer list has several experts to a place.
const PLACES: usize = 16;
/// Part of an average that a new answer replaces, once there were many.
const SHARE: f32 = 0.005;

/// See the module's text. One for each layer.
#[derive(Debug, Clone)]
pub(in crate::residency) struct Gate {
    /// By place; the last is for experts that were not named.
    right: [f32; PLACES + 1],
    /// How often it was judged.
    judged: u32,
}

impl Default for Gate {
    fn default() -> Self {
        // As often right as wrong, until it is known.
        let mut right = [0.5; PLACES + 1];
        right[PLACES] = 0.0;
        Self { right, judged: 0 }
    }
}

fn place(index: usize, named: usize) -> usize {
    (index * PLACES / named.max(1)).min(PLACES - 1)
}

impl Gate {
    /// The chance that the `index`th of so many named experts is used.
    pub(in crate::residency) fn chance(&self, index: usize, named: usize) -> f32 {
        self.right[place(index, named)]
    }

    /// The chance that one which was not named is used.
    pub(in crate::residency) fn chance_of_others(&self) -> f32 {
        self.right[PLACES]
    }

    /// These of `experts` were named; these were used.
    pub(in crate::residency) fn judge(&mut self, named: &[u32], used: &[u32], experts: usize) {
        self.judged = self.judged.saturating_add(1);
        let share = SHARE.max(1.0 / (self.judged as f32 + 4.0));
        let mut others = used.len();
        for (index, expert) in named.iter().enumerate() {
            let hit = used.contains(expert);
            others = others.saturating_sub(usize::from(hit));
            let right = &mut self.right[place(index, named.len())];
            *right += share * (f32::from(u8::from(hit)) - *right);
        }
        let rest = experts.saturating_sub(named.len()).max(1);
        let right = &mut self.right[PLACES];
        *right += share * (others as f32 / rest as f32 - *right);
    }
}
