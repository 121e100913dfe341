//! `lite-llm bench store`: recorded texts through the residency machine, policy by policy.

mod picture;
mod replay;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
};

use anyhow::{Context, Result, anyhow};
use lite_llm_runtime::trace;
use serde_json::{Value, json};

use self::{
    picture::Panel,
    replay::{Kind, Outcome, Script, Setting},
};
use super::samples::print_table;
use crate::{
    cli::BenchStoreArgs,
    commands::bad_input,
    machine,
    progress::{Progress, Unit},
};

/// Parts of all experts that have room, if nobody says.
const PARTS: [f64; 4] = [0.12, 0.25, 0.5, 0.75];

/// Policies whose hit rates are shown layer by layer, and with what is fetched early.
const BY_LAYER: [Kind; 3] = [Kind::Lru, Kind::Ours, Kind::Belady];
const EARLY: [Kind; 2] = [Kind::Lru, Kind::Ours];

pub(super) async fn measure(args: BenchStoreArgs, json: bool) -> Result<()> {
    let scripts = scripts(&args)?;
    let slots = slots(&args, &scripts)?;
    let settings = settings(&scripts, &slots, &args.disk);
    let replayed = tokio::task::spawn_blocking(move || replay_all(&settings, json));
    let report = Report { scripts, slots, replayed: replayed.await? };
    if let Some(path) = &args.picture {
        report.draw(path)?;
    }
    match json {
        true => say!("{}", report.json()),
        false => report.print(),
    }
    Ok(())
}

/// The texts, each alone, and all by turns.
fn scripts(args: &BenchStoreArgs) -> Result<Vec<Arc<Script>>> {
    let mut traces = Vec::new();
    for path in &args.trace {
        traces.extend(trace::read(path).map_err(bad_input)?);
    }
    traces.iter_mut().for_each(|trace| trace.truncate(args.tokens as usize));
    let traces: Vec<_> = traces.into_iter().map(Arc::new).collect();
    let shape = |trace: &trace::Trace| (trace.layers(), trace.experts);
    let mut shapes = traces.iter().map(|trace| shape(trace));
    let first = shapes.next();
    if let Some((layers, experts)) = shapes.find(|shape| Some(*shape) != first) {
        return Err(bad_input(anyhow!(
            "the traces are of different models: {first:?} layers and experts, and {layers} and \
             {experts}; give those of one model"
        )));
    }
    let mut scripts: Vec<_> = traces.iter().map(|trace| Arc::new(Script::alone(trace))).collect();
    if traces.len() > 1 {
        scripts.push(Arc::new(Script::turns(&traces, args.turn as usize)));
    }
    Ok(scripts)
}

fn slots(args: &BenchStoreArgs, scripts: &[Arc<Script>]) -> Result<Vec<usize>> {
    let (layers, experts) = (scripts[0].layers(), scripts[0].experts());
    let active = scripts.iter().map(|script| script.active()).max().unwrap_or(1);
    // A token's experts of a layer are here at the same time.
    let least = active.div_ceil(layers);
    let mut slots: Vec<usize> = args.slots.iter().map(|&slots| slots as usize).collect();
    if slots.is_empty() {
        let part = |part: f64| ((part * experts as f64).round() as usize).clamp(least, experts);
        slots = PARTS.map(part).to_vec();
    }
    slots.sort_unstable();
    slots.dedup();
    if let Some(bad) = slots.iter().find(|slots| !(least..=experts).contains(slots)) {
        return Err(bad_input(anyhow!(
            "--slots {bad}: {least} to {experts} experts of each layer are expected"
        )));
    }
    Ok(slots)
}

fn settings(scripts: &[Arc<Script>], slots: &[usize], disks: &[f64]) -> Vec<Setting> {
    let mut settings = Vec::new();
    for script in scripts {
        for &slots in slots {
            let mut add = |kind, disk, early| {
                settings.push(Setting { script: script.clone(), kind, slots, disk, early });
            };
            Kind::ALL.iter().for_each(|&kind| add(kind, None, false));
            for &disk in disks {
                for kind in EARLY {
                    add(kind, Some(disk), false);
                    add(kind, Some(disk), true);
                }
            }
        }
    }
    settings
}

/// Replays on all cores.
fn replay_all(settings: &[Setting], quiet: bool) -> Vec<(Setting, Outcome)> {
    let mut progress = Progress::new("store", Unit::Things("replays"), quiet);
    let mut outcomes: Vec<Option<Outcome>> = vec![None; settings.len()];
    let (done, came) = mpsc::channel();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..machine::cores() {
            let (done, next) = (done.clone(), &next);
            scope.spawn(move || {
                while let Some((at, setting)) =
                    settings.iter().enumerate().nth(next.fetch_add(1, Relaxed))
                {
                    // The other end waits for all.
                    let _ = done.send((at, setting.replay()));
                }
            });
        }
        drop(done);
        for (count, (at, outcome)) in came.iter().enumerate() {
            outcomes[at] = Some(outcome);
            progress.update(count as u64 + 1, settings.len() as u64, &settings[at].script.name);
        }
    });
    progress.finish();
    settings.iter().cloned().zip(outcomes.into_iter().flatten()).collect()
}

struct Report {
    scripts: Vec<Arc<Script>>,
    slots: Vec<usize>,
    replayed: Vec<(Setting, Outcome)>,
}

impl Report {
    /// Names of texts are theirs, and may be equal.
    fn of(&self, script: &Script) -> impl Iterator<Item = &(Setting, Outcome)> {
        self.replayed.iter().filter(move |(setting, _)| std::ptr::eq(&*setting.script, script))
    }

    fn plain(&self, script: &Script, kind: Kind, slots: usize) -> Option<&Outcome> {
        let is = |setting: &Setting| {
            (setting.kind, setting.slots, setting.disk) == (kind, slots, None) && !setting.early
        };
        self.of(script).find(|(setting, _)| is(setting)).map(|(_, outcome)| outcome)
    }

    /// How much of what LRU leaves to Belady a policy gets; none if that is nothing.
    fn share(&self, script: &Script, kind: Kind, slots: usize) -> Option<f64> {
        let rate = |kind| self.plain(script, kind, slots).map(Outcome::hit_rate);
        let (least, most, own) = (rate(Kind::Lru)?, rate(Kind::Belady)?, rate(kind)?);
        (most - least > 1e-3).then(|| (own - least) / (most - least))
    }

    fn print(&self) {
        for script in &self.scripts {
            let (layers, experts) = (script.layers(), script.experts());
            say!(
                "\n{}: {} tokens, {layers} layers of {experts} experts, {} for a token\n",
                script.name,
                script.len(),
                script.active()
            );
            self.print_rates(script);
            say!();
            self.print_layers(script);
            say!();
            self.print_early(script);
        }
    }

    fn print_rates(&self, script: &Script) {
        let heading: Vec<String> =
            self.slots.iter().map(|slots| format!("{slots} of {}", script.experts())).collect();
        let heading: Vec<&str> = ["hit rate (share of the gap)"]
            .into_iter()
            .chain(heading.iter().map(String::as_str))
            .collect();
        let cell = |kind, slots| {
            let rate = self.plain(script, kind, slots).map_or(0.0, Outcome::hit_rate);
            match self.share(script, kind, slots) {
                Some(share) => format!("{rate:.4} ({share:.2})"),
                None => format!("{rate:.4}       "),
            }
        };
        let row = |kind: Kind| {
            let cells = self.slots.iter().map(|&slots| cell(kind, slots));
            [kind.name().to_owned()].into_iter().chain(cells).collect()
        };
        print_table(&heading, &Kind::ALL.map(row));
    }

    fn print_layers(&self, script: &Script) {
        let heading: Vec<String> = (0..script.layers()).map(|layer| layer.to_string()).collect();
        let heading: Vec<&str> =
            ["by layer"].into_iter().chain(heading.iter().map(String::as_str)).collect();
        let mut rows = Vec::new();
        for &slots in &self.slots {
            for kind in BY_LAYER {
                let rates = self.plain(script, kind, slots).map(Outcome::layer_hit_rates);
                let cells = rates.into_iter().flatten().map(|rate| format!("{rate:.3}"));
                let name = format!("{}, {slots}", kind.name());
                rows.push([name].into_iter().chain(cells).collect());
            }
        }
        print_table(&heading, &rows);
    }

    fn print_early(&self, script: &Script) {
        let heading = [
            "with a disk",
            "here in time",
            "loads/token",
            "in vain",
            "layer-times/token",
            "tokens/s ×",
        ];
        let (mut rows, mut before) = (Vec::new(), 1.0);
        for (setting, outcome) in self.of(script) {
            let Some(disk) = setting.disk else { continue };
            let early = if setting.early { ", early" } else { "" };
            if !setting.early {
                before = outcome.layer_times();
            }
            rows.push(vec![
                format!("{} of {disk} a layer-time, {}{early}", setting.slots, setting.kind.name()),
                format!("{:.3}", outcome.hit_rate()),
                format!("{:.1}", outcome.loads()),
                format!("{:.1}", outcome.vain_loads()),
                format!("{:.2}", outcome.layer_times()),
                format!("{:.2}", before / outcome.layer_times()),
            ]);
        }
        print_table(&heading, &rows);
    }

    fn json(&self) -> Value {
        let replays = self.replayed.iter().map(|(setting, outcome)| {
            let counters = outcome.counters;
            let share = match setting.disk {
                None => self.share(&setting.script, setting.kind, setting.slots),
                Some(_) => None,
            };
            json!({
                "text": setting.script.name,
                "policy": setting.kind.name(),
                "slots": setting.slots,
                "experts": setting.script.experts(),
                "disk": setting.disk,
                "early": setting.early,
                "tokens": outcome.tokens,
                "hit_rate": outcome.hit_rate(),
                "share_of_gap": share,
                "hit_rate_by_layer": outcome.layer_hit_rates(),
                "loads_per_token": outcome.loads(),
                "loads_in_vain_per_token": outcome.vain_loads(),
                "layer_times_per_token": outcome.layer_times(),
                "early_fetches": counters.prefetches,
                "early_fetches_used": counters.prefetches_used,
                "missed_what_had_gone_for_one": counters.prefetch_regrets,
            })
        });
        json!({ "replays": replays.collect::<Vec<_>>() })
    }

    fn draw(&self, path: &Path) -> Result<()> {
        let panel = |script: &Arc<Script>| Panel {
            title: script.name.clone(),
            lines: Kind::ALL.iter().map(|&kind| (kind, self.line(script, kind))).collect(),
        };
        let panels: Vec<Panel> = self.scripts.iter().map(panel).collect();
        let experts = self.scripts[0].experts();
        let heading = format!("Hit rate by size of the cache, {experts} experts a layer");
        std::fs::write(path, picture::draw(&heading, &panels))
            .with_context(|| format!("{}: cannot write", path.display()))
    }

    fn line(&self, script: &Script, kind: Kind) -> picture::Line {
        let point = |&slots: &usize| {
            let rate = self.plain(script, kind, slots).map_or(0.0, Outcome::hit_rate);
            (slots as f64 / script.experts() as f64, rate)
        };
        self.slots.iter().map(point).collect()
    }
}
