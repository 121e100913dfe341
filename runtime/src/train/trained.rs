//! Which parameters a phase trains, and which it leaves as they are, to the bit.

use super::params::Params;

/// What of a parameter is trained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Trained {
    /// Nothing.
    #[default]
    Nothing,
    /// All of it.
    All,
    /// These rows, upwards.
    Rows(Vec<usize>),
}

/// What a phase of the curriculum trains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Everything but tiers, their gates and the tier gates.
    pub backbone: bool,
    /// Experts and gates of these tiers, by index.
    pub tiers: Vec<usize>,
    /// Of the gates over tiers the rows of the trained tiers.
    pub gates: bool,
}

impl Selection {
    /// What of each parameter is trained, in the order of parameters.
    pub fn resolve(&self, params: &Params) -> Vec<Trained> {
        let tiers = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
        self.of_names(params.list().iter().map(|param| &param.name), tiers)
    }

    /// The same of names of parameters, of a model of so many tiers.
    pub fn of_names<'a>(
        &self,
        names: impl Iterator<Item = &'a String>,
        tiers: usize,
    ) -> Vec<Trained> {
        names.map(|name| self.of(name, tiers)).collect()
    }

    fn of(&self, name: &str, tiers: usize) -> Trained {
        let when = |yes: bool| if yes { Trained::All } else { Trained::Nothing };
        let rest = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        match rest.map(|(_, rest)| rest) {
            // Where there is no choice, the row of the one tier is not used.
            Some("router.tiers") if !self.gates || tiers < 2 || self.tiers.is_empty() => {
                Trained::Nothing
            }
            Some("router.tiers") if self.tiers.len() == tiers => Trained::All,
            Some("router.tiers") => Trained::Rows(self.tiers.clone()),
            Some(rest) => match rest.strip_prefix("tiers.").and_then(|r| r.split_once('.')) {
                Some((tier, _)) => {
                    when(tier.parse().is_ok_and(|tier: usize| self.tiers.contains(&tier)))
                }
                None => when(self.backbone),
            },
            None => when(self.backbone),
        }
    }
}

/// What is trained where parameters are frozen by the beginnings of their names, and rows by theirs.
pub fn all_but(
    params: &Params,
    frozen: &[String],
    frozen_rows: &[(String, Vec<usize>)],
) -> Vec<Trained> {
    let one = |name: &str, rows: usize| {
        if frozen.iter().any(|prefix| name.starts_with(prefix.as_str())) {
            return Trained::Nothing;
        }
        match frozen_rows.iter().find(|(n, _)| n == name) {
            Some((_, frozen)) => {
                let left: Vec<usize> = (0..rows).filter(|row| !frozen.contains(row)).collect();
                if left.is_empty() { Trained::Nothing } else { Trained::Rows(left) }
            }
            None => Trained::All,
        }
    };
    params.list().iter().map(|param| one(&param.name, param.shape[0])).collect()
}
