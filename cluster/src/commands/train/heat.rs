//! Expert load of a run as heat maps: for each phase a row of them, one per tier, layers down and experts across.

use std::{collections::BTreeMap, fmt::Write};

use serde::Deserialize;
use serde_json::Value;

use super::plot::{CHARACTER, MARGIN, PLOT, escape};

const HEADING: f64 = 44.0;
/// One line above all of them: what colours mean.
const LEGEND: f64 = 24.0;
const BELOW: f64 = 22.0;
/// Between two tiers.
const GAP: f64 = 14.0;
const CELL_MAX: f64 = 22.0;
/// A colour is at its strongest where an expert has 8 times its even share, or an eighth of it.
const DOUBLINGS: f64 = 3.0;
/// More than its share, less than it; white is even. Okabe and Ito's blue and vermilion.
const MORE: [f64; 3] = [0.0, 114.0, 178.0];
const LESS: [f64; 3] = [213.0, 94.0, 0.0];

/// What `load` lines say of a tier.
#[derive(Debug, Clone, Deserialize)]
struct Tier {
    tier: String,
    groups: usize,
    /// Assignments by layer and expert, group after group.
    layers: Vec<Vec<u64>>,
}

impl Tier {
    fn experts(&self) -> usize {
        self.layers.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn add(&mut self, other: &Tier) {
        for (here, there) in self.layers.iter_mut().zip(&other.layers) {
            here.iter_mut().zip(there).for_each(|(here, there)| *here += there);
        }
    }
}

/// A step, and what was counted in it.
type Counted = (u64, Vec<Tier>);

/// The heat maps of a phase.
#[derive(Debug)]
pub(super) struct Row {
    title: String,
    tiers: Vec<Tier>,
}

impl Row {
    fn experts(&self) -> usize {
        self.tiers.iter().map(Tier::experts).sum()
    }

    fn layers(&self) -> usize {
        self.tiers.iter().map(|tier| tier.layers.len()).max().unwrap_or(0)
    }

    fn cell(&self) -> (f64, f64) {
        let gaps = GAP * self.tiers.len().saturating_sub(1) as f64;
        let wide = (PLOT.0 - gaps) / self.experts().max(1) as f64;
        (wide.min(CELL_MAX), (PLOT.1 / self.layers().max(1) as f64).min(CELL_MAX))
    }

    fn height(&self) -> f64 {
        HEADING + self.layers() as f64 * self.cell().1 + BELOW
    }
}

/// One row for each phase: the sum of what was counted in the later half of it.
pub(super) fn rows(loads: &BTreeMap<u64, Value>) -> Vec<Row> {
    let mut phases: Vec<(&str, Vec<Counted>)> = Vec::new();
    for (step, value) in loads {
        let Ok(tiers) = Vec::<Tier>::deserialize(&value["tiers"]) else { continue };
        let name = value["phase"].as_str().unwrap_or_default();
        if phases.last().is_none_or(|(last, _)| *last != name) {
            phases.push((name, Vec::new()));
        }
        phases.iter_mut().last().into_iter().for_each(|phase| phase.1.push((*step, tiers.clone())));
    }
    let row = |(name, mut counted): (&str, Vec<Counted>)| {
        let later = counted.split_off(counted.len() / 2);
        let [first, last] = [later.first(), later.last()].map(|of| of.map_or(0, |(step, _)| *step));
        let mut all = later.into_iter().map(|(_, tiers)| tiers);
        let mut sum = all.next().unwrap_or_default();
        for tiers in all {
            sum.iter_mut().zip(&tiers).for_each(|(sum, tier)| sum.add(tier));
        }
        Row { title: format!("{name}, counted at steps {first} to {last}"), tiers: sum }
    };
    phases.into_iter().map(row).collect()
}

/// How high all of them are.
pub(super) fn height(rows: &[Row]) -> f64 {
    if rows.is_empty() { 0.0 } else { LEGEND + rows.iter().map(Row::height).sum::<f64>() }
}

/// Colour of an expert with so many times its even share.
fn colour(share: f64) -> String {
    if share <= 0.0 {
        return "#000000".into();
    }
    let doublings = share.log2().clamp(-DOUBLINGS, DOUBLINGS) / DOUBLINGS;
    let end = if doublings > 0.0 { MORE } else { LESS };
    let mixed = end.map(|c| (255.0 + (c - 255.0) * doublings.abs()).round() as u8);
    format!("#{:02x}{:02x}{:02x}", mixed[0], mixed[1], mixed[2])
}

/// Draws them from `top` on.
pub(super) fn draw(svg: &mut String, rows: &[Row], mut top: f64) {
    // Writing to a string cannot fail.
    let mut add = |element: std::fmt::Arguments<'_>| {
        let _ = writeln!(svg, "{element}");
    };
    if !rows.is_empty() {
        add(format_args!(
            r##"<text x="{:.0}" y="{:.0}">expert load: white is even; blue more, up to 8 times; red less; black none</text>"##,
            MARGIN.0,
            top + 12.0
        ));
        top += LEGEND;
    }
    for row in rows {
        let (wide, high) = row.cell();
        let (title, at) = (escape(&row.title), top + HEADING);
        add(format_args!(
            r##"<text x="{:.0}" y="{:.0}" font-weight="bold">expert load: {title}</text>"##,
            MARGIN.0,
            top + 12.0
        ));
        let every = (11.0 / high).ceil().max(1.0) as usize;
        for layer in (0..row.layers()).step_by(every) {
            let y = at + (layer as f64 + 0.5) * high + 4.0;
            add(format_args!(
                r##"<text x="{:.1}" y="{y:.1}" text-anchor="end">layer {layer}</text>"##,
                MARGIN.0 - 6.0
            ));
        }
        let mut left = MARGIN.0;
        for tier in &row.tiers {
            let experts = tier.experts();
            let groups = tier.groups.max(1);
            let label = format!("{}: {groups} × {} experts", tier.tier, experts / groups);
            add(format_args!(
                r##"<text x="{left:.1}" y="{:.1}">{}</text>"##,
                at - 8.0,
                escape(&label)
            ));
            for (layer, counts) in tier.layers.iter().enumerate() {
                let even = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
                for (expert, count) in counts.iter().enumerate() {
                    let share = *count as f64 / even.max(f64::MIN_POSITIVE);
                    add(format_args!(
                        r##"<rect x="{:.2}" y="{:.2}" width="{wide:.2}" height="{high:.2}" fill="{}"><title>layer {layer}, expert {expert}: {count} assignments, {share:.2} × even</title></rect>"##,
                        left + expert as f64 * wide,
                        at + layer as f64 * high,
                        colour(share)
                    ));
                }
            }
            let (width, height) = (experts as f64 * wide, tier.layers.len() as f64 * high);
            for group in 0..groups {
                add(format_args!(
                    r##"<rect x="{:.2}" y="{at:.2}" width="{:.2}" height="{height:.2}" fill="none" stroke="#444444"/>"##,
                    left + width * group as f64 / groups as f64,
                    width / groups as f64
                ));
            }
            left += width.max(label.chars().count() as f64 * CHARACTER) + GAP;
        }
        top += row.height();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_phase_has_a_row_and_an_expert_its_colour() {
        let load = |phase: &str, counts: [u64; 4]| {
            let tier =
                |name: &str| json!({ "tier": name, "groups": 2, "layers": [counts, counts] });
            json!({ "phase": phase, "tiers": [tier("tier_1b"), tier("a<b")] })
        };
        let loads = [
            (10, load("0", [100, 0, 0, 0])),
            (20, load("0", [4, 4, 8, 0])),
            (30, load("0", [4, 4, 8, 0])),
            (40, load("1", [1, 1, 1, 1])),
        ]
        .into();
        let rows = rows(&loads);
        let titles: Vec<&str> = rows.iter().map(|row| row.title.as_str()).collect();
        assert_eq!(titles, ["0, counted at steps 20 to 30", "1, counted at steps 40 to 40"]);
        assert_eq!(rows[0].tiers[0].layers[1], [8, 8, 16, 0]);
        let mut svg = String::new();
        draw(&mut svg, &rows, 0.0);
        assert_eq!(svg.matches("<title>").count(), 2 * 2 * 2 * 4);
        assert!(svg.contains("layer 1, expert 2: 16 assignments, 2.00 × even"));
        assert!(svg.contains("a&lt;b: 2 × 2 experts") && svg.contains("#000000"));
        assert_eq!(colour(1.0), "#ffffff");
        assert_eq!((colour(64.0), colour(0.001)), ("#0072b2".into(), "#d55e00".into()));
        assert!(height(&rows) > 2.0 * HEADING);
    }

    #[test]
    fn lines_of_another_form_are_passed_over() {
        assert!(
            rows(&[(1, json!({ "tiers": [{ "tier": 3 }] })), (2, json!({}))].into()).is_empty()
        );
    }
}
