//! `lite-llm train plot`: a run's losses, balance, load by tier and load of every expert as SVG.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::{heat, metrics};
use crate::{cli::TrainPlotArgs, commands::bad_input};

/// Width and height of a panel.
pub(super) const PLOT: (f64, f64) = (760.0, 190.0);
/// Beside and below it.
pub(super) const MARGIN: (f64, f64) = (70.0, 46.0);
/// About how wide a character is.
pub(super) const CHARACTER: f64 = 6.8;
/// Okabe and Ito's, which people who see few colours tell apart; dashes differ as well.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#000000"];
const DASHES: [&str; 3] = ["none", "7 3", "2 3"];
/// Points of a line at most: more cannot be told apart.
const POINTS_MAX: usize = 1500;

type Line = Vec<(f64, f64)>;

struct Panel {
    title: &'static str,
    lines: Vec<(String, Line)>,
}

pub(super) fn plot(args: &TrainPlotArgs, json: bool) -> Result<()> {
    let [steps, looks, loads] = metrics::read(&args.run).map_err(bad_input)?;
    if steps.is_empty() {
        let run = args.run.display();
        return Err(bad_input(anyhow!("{run}: its metrics.jsonl has no step yet")));
    }
    let out = args.out.clone().unwrap_or_else(|| args.run.join("plot.svg"));
    let heading = format!("{}: {} steps", args.run.display(), steps.len());
    let svg = draw(&heading, &steps, &panels(&steps, &looks), &heat::rows(&loads));
    fs::write(&out, svg).with_context(|| format!("{}: cannot write", out.display()))?;
    if json {
        say!("{}", json!({ "out": out, "steps": steps.len() }));
    } else {
        say!("{} steps drawn to {}", steps.len(), out.display());
    }
    Ok(())
}

fn line(of: &BTreeMap<u64, Value>, value: impl Fn(&Value) -> Option<f64>) -> Line {
    let every = of.len().div_ceil(POINTS_MAX).max(1);
    let points = of.iter().filter_map(|(step, record)| Some((*step as f64, value(record)?)));
    points.filter(|(_, y)| y.is_finite()).step_by(every).collect()
}

fn panels(steps: &BTreeMap<u64, Value>, looks: &BTreeMap<u64, Value>) -> Vec<Panel> {
    let of = |key: &'static str| line(steps, move |record| record[key].as_f64());
    let losses = vec![
        ("cross-entropy, nats".to_owned(), of("ce")),
        ("held out, nats".to_owned(), line(looks, |record| record["held_out"].as_f64())),
    ];
    let balance = [("tiers", "kl_tier"), ("groups", "kl_group"), ("experts", "kl_expert")];
    let balance = balance.map(|(name, key)| (format!("KL over {name}"), of(key))).to_vec();
    let tiers: BTreeSet<String> = steps
        .values()
        .flat_map(|record| record["tiers"].as_array().into_iter().flatten())
        .filter_map(|tier| tier["tier"].as_str().map(str::to_owned))
        .collect();
    let of_tier = |name: &str, key: &str| {
        line(steps, |record| {
            let all = record["tiers"].as_array()?;
            let sum: f64 = all.iter().filter_map(|tier| tier["assignments"].as_f64()).sum();
            let tier = all.iter().find(|tier| tier["tier"] == name)?;
            match key {
                "share" => Some(tier["assignments"].as_f64()? / sum.max(1.0)),
                key => tier[key].as_f64(),
            }
        })
    };
    let load = tiers.iter().map(|tier| (tier.clone(), of_tier(tier, "share"))).collect();
    let starved = tiers.iter().map(|tier| (tier.clone(), of_tier(tier, "starved"))).collect();
    vec![
        Panel { title: "loss", lines: losses },
        Panel { title: "balance: 0 is even", lines: balance },
        Panel { title: "load: share of assignments by tier", lines: load },
        Panel { title: "experts without a token in the window, by tier", lines: starved },
    ]
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// As much of a text as has room.
fn cut(text: &str, room: f64) -> String {
    let most = (room / CHARACTER) as usize;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(most.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Phases as their names and first steps.
fn phases(steps: &BTreeMap<u64, Value>) -> Vec<(f64, String)> {
    let mut all: Vec<(f64, String)> = Vec::new();
    for (step, record) in steps {
        let name = record["phase"].as_str().unwrap_or_default();
        if all.last().is_none_or(|(_, last)| last != name) {
            all.push((*step as f64, name.to_owned()));
        }
    }
    all
}

fn draw(
    heading: &str,
    steps: &BTreeMap<u64, Value>,
    panels: &[Panel],
    heat: &[heat::Row],
) -> String {
    let below = 60.0 + panels.len() as f64 * (PLOT.1 + MARGIN.1 + 30.0);
    let (width, height) = (PLOT.0 + 2.0 * MARGIN.0, below + heat::height(heat));
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let mut add = |element: std::fmt::Arguments<'_>| {
        let _ = writeln!(svg, "{element}");
    };
    add(format_args!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" font-family="sans-serif" font-size="12" fill="#222222"><rect width="{width:.0}" height="{height:.0}" fill="#ffffff"/>"##
    ));
    let heading = escape(heading);
    add(format_args!(r#"<text x="20" y="26" font-size="16" font-weight="bold">{heading}</text>"#));
    let first = steps.keys().next().copied().unwrap_or(0) as f64;
    let last = steps.keys().next_back().copied().unwrap_or(0) as f64;
    let phases = phases(steps);
    for (n, panel) in panels.iter().enumerate() {
        let top = 60.0 + n as f64 * (PLOT.1 + MARGIN.1 + 30.0) + 24.0;
        let values = || panel.lines.iter().flat_map(|(_, line)| line).map(|(_, y)| *y);
        let low = values().fold(0.0, f64::min);
        let high = values().fold(low + 1e-9, f64::max);
        let x = |step: f64| MARGIN.0 + (step - first) / (last - first).max(1.0) * PLOT.0;
        let y = |value: f64| top + (1.0 - (value - low) / (high - low)) * PLOT.1;
        let title = panel.title;
        add(format_args!(
            r#"<text x="{:.0}" y="{:.0}" font-weight="bold">{title}</text>"#,
            MARGIN.0,
            top - 10.0
        ));
        for tick in 0..=4 {
            let value = low + f64::from(tick) / 4.0 * (high - low);
            let (left, right, at) = (MARGIN.0, MARGIN.0 + PLOT.0, y(value));
            add(format_args!(
                r##"<line x1="{left:.1}" y1="{at:.1}" x2="{right:.1}" y2="{at:.1}" stroke="#dddddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{value:.3}</text>"##,
                left - 6.0,
                at + 4.0
            ));
        }
        for (n, (step, name)) in phases.iter().enumerate() {
            let (at, bottom) = (x(*step), top + PLOT.1);
            let room = x(phases.get(n + 1).map_or(last, |(next, _)| *next)) - at;
            let name = escape(&cut(&format!("step {step:.0}: {name}"), room));
            add(format_args!(
                r##"<line x1="{at:.1}" y1="{top:.1}" x2="{at:.1}" y2="{bottom:.1}" stroke="#888888"/><text x="{at:.1}" y="{:.1}">{name}</text>"##,
                bottom + 16.0
            ));
        }
        for (i, (name, points)) in panel.lines.iter().enumerate() {
            let (colour, dash) =
                (COLOURS[i % COLOURS.len()], DASHES[i / COLOURS.len() % DASHES.len()]);
            let path: Vec<String> =
                points.iter().map(|(step, v)| format!("{:.1},{:.1}", x(*step), y(*v))).collect();
            let (at, name) =
                (MARGIN.0 + PLOT.0 - 170.0 * (panel.lines.len() - i) as f64, escape(name));
            add(format_args!(
                r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/><text x="{at:.1}" y="{:.1}" fill="{colour}">{name}</text>"#,
                path.join(" "),
                top - 10.0
            ));
        }
    }
    heat::draw(&mut svg, heat, below);
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loss_level_and_tier_has_its_line_and_every_phase_its_place() {
        let step = |n: u64| {
            let tier = |name: &str, assignments: u64| json!({ "tier": name, "assignments": assignments, "starved": 0 });
            let value = json!({
                "step": n, "phase": if n < 5 { "a < b" } else { "c" }, "ce": 3.0 - n as f64 / 10.0,
                "kl_tier": 0.1, "kl_group": 0.2, "kl_expert": 0.3,
                "tiers": [tier("tier_1b", 30), tier("tier_10b", 10)],
            });
            (n, value)
        };
        let steps: BTreeMap<u64, Value> = (1..=9).map(step).collect();
        let looks = [(9, json!({ "held_out": 2.5 }))].into();
        let panels = panels(&steps, &looks);
        assert_eq!(panels[2].lines[0].0, "tier_10b");
        assert_eq!(panels[2].lines[0].1[0], (1.0, 0.25));
        let svg = draw("a & b", &steps, &panels, &[]);
        assert_eq!(svg.matches("<polyline").count(), 2 + 3 + 2 + 2);
        assert!(svg.contains("a &amp; b") && svg.contains("step 5: c"));
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        assert_eq!((cut("a phase", 60.0), cut("a phase", 30.0)), ("a phase".into(), "a p…".into()));
    }
}
