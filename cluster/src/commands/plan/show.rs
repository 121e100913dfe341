//! A plan for people and for programs.

use lite_llm_runtime::{
    plan::{Bound, Prediction, Purchase, SourceKind},
    residency::replay::Tally,
};
use serde_json::{Value, json};

use super::{Report, gpu::GpuReport, room};
use crate::{
    commands::bench::samples::print_table,
    size::{Rate, Size},
};

pub(super) fn rate(bytes: f64) -> Rate {
    Rate(bytes as u64)
}

/// Seconds, as few digits as say enough.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

/// Tokens per second, three digits of them.
fn speed(prediction: &Prediction) -> String {
    speed_of(prediction.tokens_per_second)
}

pub(super) fn speed_of(tokens_per_second: f64) -> String {
    match tokens_per_second {
        s if s >= 100.0 => format!("{s:.0}"),
        s if s >= 10.0 => format!("{s:.1}"),
        s => format!("{s:.2}"),
    }
}

pub(super) fn share(part: u64, of: u64) -> String {
    format!("{:.2}", part as f64 / of.max(1) as f64)
}

fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn purchase(what: Purchase) -> String {
    match what {
        Purchase::Dram(bytes) => format!("+{} DRAM", Size(bytes)),
        Purchase::Disk => "a disk twice as fast".into(),
        Purchase::Archive => "twice the archive's bandwidth".into(),
        Purchase::Memory => "memory twice as fast".into(),
        Purchase::Worker => "one more worker".into(),
    }
}

fn bound(what: Bound) -> &'static str {
    match what {
        Bound::Compute => "computing, which is reading weights from memory",
        Bound::Disk => "the disk's bandwidth",
        Bound::Archive => "the archive's bandwidth",
        Bound::Latency => "waiting for a fetch's first byte",
        Bound::Network => "waiting for other workers",
    }
}

impl Report {
    fn source(&self) -> &'static str {
        match self.plan.source_kind {
            SourceKind::Disk if self.disk.is_none() => "program",
            SourceKind::Disk => "disk",
            SourceKind::Archive => "archive",
        }
    }

    pub(super) fn print(&self) {
        let plan = &self.plan;
        say!(
            "{} ({}): {} of {}, {} for experts each, prompts of {}, {}, {}\n",
            self.model,
            self.dtype,
            plural(plan.workers, "worker"),
            plural(self.threads, "thread"),
            Size(plan.dram),
            plural(plan.prompt, "token"),
            plural(plan.streams, "stream"),
            self.routing
        );
        self.print_rates();
        self.print_places();
        self.print_time();
        let now = &self.now;
        say!(
            "\ndecode          {} tokens/s, {} a token; {:.2} of the experts it asks for are in memory",
            speed(now),
            time(plan.streams as f64 / now.tokens_per_second),
            now.decode.hit_rate()
        );
        say!("                bound by {}", bound(now.bound));
        say!("first token     after {} of a prompt of {}", time(now.first_token), plan.prompt);
        if let Some((needed, total)) = room(plan) {
            say!(
                "                a worker needs {} of memory; this machine has {}",
                Size(needed),
                Size(total)
            );
        }
        say!("\nnext            {}", self.advice());
        if let Some(gpu) = &self.gpu {
            gpu.print();
        }
    }

    fn print_rates(&self) {
        say!("measured here, in {}", time(self.measured_in.as_secs_f64()));
        let [measured, planned] = self.memory;
        let as_given = if measured == planned { String::new() } else { given(planned) };
        say!("  memory        reads {}{as_given}", rate(measured));
        let first = self.kernels.experts.iter().map(|time| time.first).fold(0.0, f64::max);
        say!(
            "  one row       an expert of {} {} ({}), the rest of a layer {}{}",
            Size(self.block),
            time(first),
            rate(self.block as f64 / first.max(1e-9)),
            time(self.kernels.dense.first),
            if self.kernels.engine { "" } else { " (by its bytes)" }
        );
        say!("  a fetch       alone {}, verified ({})", time(self.one), self.how);
        if let Some(disk) = self.disk {
            say!("  disk          {} in blocks of an expert", rate(disk));
        }
        let source = self.plan.source;
        say!(
            "  planned with  {} {} after {}",
            self.source(),
            rate(source.rate),
            time(source.latency)
        );
        if let Some((_, disk)) = self.plan.nvme {
            say!("                NVMe {} after {}", rate(disk.rate), time(disk.latency));
        }
    }

    fn print_places(&self) {
        let places = self.now.places;
        let of = |bytes: u64| [Size(bytes).to_string(), share(bytes, places.experts)];
        let tokens = self.now.tokens.max(1) as f64;
        let decode = &self.now.decode;
        let fetched = decode.nvme_bytes + decode.source_bytes;
        let each = |bytes: u64| Size((bytes as f64 / tokens) as u64).to_string();
        let here = decode.demanded_bytes.saturating_sub(fetched);
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut add = |name: &str, holds: [String; 2], token: u64| {
            let row = [name.to_owned()].into_iter().chain(holds);
            rows.push(row.chain([each(token), share(token, decode.demanded_bytes)]).collect());
        };
        add("DRAM", of(places.dram), here);
        if self.plan.nvme.is_some() {
            add("NVMe", of(places.nvme), decode.nvme_bytes);
        }
        add(self.source(), of(places.experts), decode.source_bytes);
        say!();
        print_table(&["experts", "bytes", "share", "a token's", "share"], &rows);
        say!("and {} of dense weights in each worker's memory", Size(self.plan.dense_bytes));
    }

    fn print_time(&self) {
        let (decode, prefill) = (&self.now.decode, &self.now.prefill);
        let tokens = self.now.tokens.max(1) as f64;
        let rows = parts(decode).into_iter().zip(parts(prefill));
        let rows = rows.filter(|(a, b)| a.1 > 0.0 || b.1 > 0.0).map(|((name, a), (_, b))| {
            let name = if name == "source" { self.source() } else { name };
            let of = |part: f64, all: f64| format!("{:.2}", part / all.max(1e-12));
            vec![
                name.to_owned(),
                time(a / tokens),
                of(a, decode.seconds),
                time(b),
                of(b, prefill.seconds),
            ]
        });
        say!();
        let heading = ["where time goes", "a token", "share", "a prompt", "share"];
        print_table(&heading, &rows.collect::<Vec<_>>());
    }

    /// What to buy next.
    fn advice(&self) -> String {
        let mut next = self.next.iter().map(|(what, then)| (purchase(*what), speed(then)));
        let Some((best, then)) = next.next() else {
            return "nothing of what could be bought makes it faster by much".into();
        };
        let others: Vec<_> = next.map(|(what, then)| format!("{what}: {then}")).collect();
        let others = match others.is_empty() {
            true => String::new(),
            false => format!(" ({})", others.join(", ")),
        };
        format!("{best}: {} → {then} tokens/s{others}", speed(&self.now))
    }

    pub(super) fn json(&self) -> Value {
        let (plan, now) = (&self.plan, &self.now);
        let device = |device: lite_llm_runtime::residency::replay::Device| json!({ "bytes_per_second": device.rate, "latency_seconds": device.latency });
        let seconds = |tally: &Tally| {
            let parts = parts(tally).into_iter().map(|(name, s)| (name.to_owned(), json!(s)));
            Value::Object(parts.collect())
        };
        let next = self.next.iter().map(|(what, then)| {
            json!({
                "what": purchase(*what),
                "tokens_per_second": then.tokens_per_second,
                "first_token_seconds": then.first_token,
            })
        });
        let tokens = now.tokens.max(1) as f64;
        let times = |times: &[lite_llm_runtime::residency::replay::RowTime]| {
            times.iter().map(|t| json!([t.first, t.each])).collect::<Vec<_>>()
        };
        json!({
            "model": self.model,
            "dtype": self.dtype,
            "routing": self.routing,
            "workers": plan.workers,
            "threads_per_worker": self.threads,
            "streams": plan.streams,
            "prompt_tokens": plan.prompt,
            "dram_bytes": plan.dram,
            "nvme_bytes": plan.nvme.map(|(bytes, _)| bytes),
            "measured": {
                "seconds": self.measured_in.as_secs_f64(),
                "memory_bytes_per_second": self.memory[0],
                "disk_bytes_per_second": self.disk,
                "fetch_seconds": self.one,
                "fetched_by": self.how,
                "expert_seconds_first_and_each_row": times(&self.kernels.experts),
                "dense_seconds_first_and_each_row": times(&[self.kernels.dense]),
                "engine_timed": self.kernels.engine,
            },
            "planned_with": {
                "memory_bytes_per_second": self.memory[1],
                self.source(): device(plan.source),
                "nvme": plan.nvme.map(|(_, disk)| device(disk)),
            },
            "experts_bytes": now.places.experts,
            "experts_in_dram_bytes": now.places.dram,
            "experts_in_nvme_bytes": now.places.nvme,
            "dense_bytes": plan.dense_bytes,
            "tokens_per_second": now.tokens_per_second,
            "first_token_seconds": now.first_token,
            "hit_rate": now.decode.hit_rate(),
            "bound": format!("{:?}", now.bound).to_lowercase(),
            "bytes_per_token": {
                "demanded": now.decode.demanded_bytes as f64 / tokens,
                "nvme": now.decode.nvme_bytes as f64 / tokens,
                self.source(): now.decode.source_bytes as f64 / tokens,
            },
            "decode_tokens": now.tokens,
            "decode_seconds": seconds(&now.decode),
            "prefill_seconds": seconds(&now.prefill),
            "next": next.collect::<Vec<_>>(),
            "gpu": self.gpu.as_ref().map(GpuReport::json),
        })
    }
}

fn given(planned: f64) -> String {
    format!("; planned with {}", rate(planned))
}

/// Seconds by what they are spent on.
fn parts(tally: &Tally) -> [(&'static str, f64); 6] {
    [
        ("dense part", tally.dense),
        ("experts", tally.experts),
        ("NVMe", tally.nvme),
        ("source", tally.source),
        ("first bytes", tally.latency),
        ("other workers", tally.network),
    ]
}
