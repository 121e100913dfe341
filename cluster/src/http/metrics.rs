//! What Prometheus asks for: requests, tokens, their latencies, and what the nodes hold.
//!
//! Invariant: the number of series is bounded: by the routes of this API, by the statuses that it
//! gives, and by [`NODES_MAX`] nodes.

use std::time::Duration;

use anyhow::Result;
use lite_llm_transport::messages::{ClusterStatus, NodeResidences, ScheduleStatus};
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder, core::Collector, proto::MetricFamily,
};

use super::choice::Finish;

/// Nodes whose series are shown; of more, the first by name.
const NODES_MAX: usize = 256;

/// Seconds; from a hit in a cache to a long prompt on a slow machine.
const FIRST_TOKEN: &[f64] = &[
    0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
];
const BETWEEN_TOKENS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.75, 1.0, 2.5, 10.0];
const WHOLE: &[f64] =
    &[0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0];

/// What is counted as it happens. Cloning shares it.
#[derive(Clone)]
pub(super) struct Metrics {
    registry: Registry,
    answers: IntCounterVec,
    ended: IntCounterVec,
    pub(super) prompt_tokens: IntCounter,
    pub(super) generation_tokens: IntCounter,
    pub(super) running: IntGauge,
    pub(super) waiting: IntGauge,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
}

impl Metrics {
    /// All at 0.
    pub(super) fn new() -> Result<Self> {
        let registry = Registry::new();
        fn kept<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C> {
            registry.register(Box::new(collector.clone()))?;
            Ok(collector)
        }
        let counters = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec> {
            kept(&registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let counter =
            |name: &str, help: &str| -> Result<_> { kept(&registry, IntCounter::new(name, help)?) };
        let gauge =
            |name: &str, help: &str| -> Result<_> { kept(&registry, IntGauge::new(name, help)?) };
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<Histogram> {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            kept(&registry, Histogram::with_opts(options)?)
        };
        Ok(Self {
            answers: counters(
                "lite_llm_http_requests_total",
                "Requests that got an answer or a refusal, by route and status.",
                &["route", "code"],
            )?,
            ended: counters(
                "lite_llm_request_success_total",
                "Answers that were generated to their end.",
                &["finished_reason"],
            )?,
            prompt_tokens: counter(
                "lite_llm_prompt_tokens_total",
                "Tokens of prompts that were let in.",
            )?,
            generation_tokens: counter(
                "lite_llm_generation_tokens_total",
                "Tokens that were generated.",
            )?,
            running: gauge("lite_llm_num_requests_running", "Jobs that generate tokens.")?,
            waiting: gauge(
                "lite_llm_num_requests_waiting",
                "Jobs that were let in and have no token yet: they wait, or their prompt is read.",
            )?,
            first_token: histogram(
                "lite_llm_time_to_first_token_seconds",
                "From the arrival of a request to the first token of each of its jobs.",
                FIRST_TOKEN,
            )?,
            between_tokens: histogram(
                "lite_llm_inter_token_latency_seconds",
                "From one token of a job to its next.",
                BETWEEN_TOKENS,
            )?,
            whole: histogram(
                "lite_llm_e2e_request_latency_seconds",
                "From the arrival of a request to the end of each of its jobs.",
                WHOLE,
            )?,
            registry,
        })
    }

    /// A request got this status.
    pub(super) fn answered(&self, route: &str, code: u16) {
        self.answers.with_label_values(&[route, &code.to_string()]).inc();
    }

    /// A job's first token came after this time.
    pub(super) fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// A job's next token came after this time.
    pub(super) fn next_token(&self, after: Duration) {
        self.between_tokens.observe(after.as_secs_f64());
    }

    /// A job ended well, after this time.
    pub(super) fn ended(&self, finish: Finish, after: Duration) {
        self.ended.with_label_values(&[finish.as_str()]).inc();
        self.whole.observe(after.as_secs_f64());
    }

    /// All of it as text, with what the cluster says of itself now.
    pub(super) fn text(
        &self,
        status: &ClusterStatus,
        residences: &[NodeResidences],
    ) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.families(status, residences)?, &mut text)?;
        Ok(text)
    }

    /// The same, not as text.
    pub(super) fn families(
        &self,
        status: &ClusterStatus,
        residences: &[NodeResidences],
    ) -> Result<Vec<MetricFamily>> {
        let mut families = self.registry.gather();
        families.extend(of_cluster(status, residences)?.gather());
        Ok(families)
    }
}

/// What the coordinator and the nodes say, as metrics.
fn of_cluster(status: &ClusterStatus, residences: &[NodeResidences]) -> Result<Registry> {
    let registry = Registry::new();
    let one = |name: &str, help: &str, value: f64| -> Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        Ok(registry.register(Box::new(gauge))?)
    };
    one(
        "lite_llm_jobs_running",
        "Jobs of all clients that run or wait.",
        status.jobs_running.into(),
    )?;
    one("lite_llm_nodes", "Workers that are here.", status.nodes.len() as f64)?;
    one("lite_llm_placement_epoch", "Number of the placement of experts.", status.epoch as f64)?;
    let jobs_done = IntCounter::new("lite_llm_jobs_done_total", "Jobs of all clients that ended.")?;
    jobs_done.inc_by(status.jobs_done);
    registry.register(Box::new(jobs_done))?;

    let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<GaugeVec> {
        let gauges = GaugeVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(gauges.clone()))?;
        Ok(gauges)
    };
    let counters = |name: &str, help: &str| -> Result<IntCounterVec> {
        let counters = IntCounterVec::new(Opts::new(name, help), &["node", "residence"])?;
        registry.register(Box::new(counters.clone()))?;
        Ok(counters)
    };
    let sequences = gauges("lite_llm_node_sequences", "Sequences at home.", &["node"])?;
    let rate = gauges("lite_llm_node_tokens_per_second", "Tokens generated lately.", &["node"])?;
    let loaded = gauges("lite_llm_node_experts_loaded", "Experts in memory.", &["node"])?;
    for node in status.nodes.iter().take(NODES_MAX) {
        let labels = &[node.name.as_str()];
        sequences.with_label_values(labels).set(node.sequences.into());
        rate.with_label_values(labels).set(f64::from(node.tokens_per_second));
        loaded.with_label_values(labels).set(node.loaded as f64);
    }
    of_schedulers(&registry, residences)?;
    let place = &["node", "residence"];
    let held = gauges("lite_llm_residence_bytes", "Bytes of experts that are there.", place)?;
    let budget =
        gauges("lite_llm_residence_budget_bytes", "Bytes of experts that may be there.", place)?;
    let hits = counters("lite_llm_residence_hits_total", "Experts that were found there.")?;
    let misses = counters("lite_llm_residence_misses_total", "Experts that were not.")?;
    let moved = counters("lite_llm_residence_read_bytes_total", "Bytes that came from there.")?;
    let failed = counters("lite_llm_residence_failures_total", "Transfers that failed.")?;
    for node in residences.iter().take(NODES_MAX) {
        for residence in &node.residences {
            let labels = &[node.name.as_str(), residence.name.as_str()];
            held.with_label_values(labels).set(residence.held as f64);
            if let Some(bytes) = residence.budget {
                budget.with_label_values(labels).set(bytes as f64);
            }
            hits.with_label_values(labels).inc_by(residence.hits);
            misses.with_label_values(labels).inc_by(residence.misses);
            moved.with_label_values(labels).inc_by(residence.bytes);
            failed.with_label_values(labels).inc_by(residence.failures);
        }
    }
    Ok(registry)
}

/// What the nodes' schedulers have done.
fn of_schedulers(registry: &Registry, nodes: &[NodeResidences]) -> Result<()> {
    type Of = fn(&ScheduleStatus) -> u64;
    let gauges: [(&str, &str, Of); 5] = [
        ("lite_llm_node_sequences_running", "Sequences that have pages.", |s| s.running),
        ("lite_llm_node_sequences_waiting", "Sequences that wait for pages.", |s| s.waiting),
        ("lite_llm_kv_cache_pages", "Pages of the cache of keys and values.", |s| s.pages),
        ("lite_llm_kv_cache_pages_used", "Pages that sequences have.", |s| s.pages_used),
        ("lite_llm_kv_cache_pages_idle", "Pages kept for their prefix alone.", |s| s.pages_idle),
    ];
    let counters: [(&str, &str, Of); 6] = [
        ("lite_llm_positions_computed_total", "Positions that were computed.", |s| s.computed),
        (
            "lite_llm_prefix_cache_hit_tokens_total",
            "Positions that were found in the cache of prefixes.",
            |s| s.found,
        ),
        (
            "lite_llm_num_preemptions_total",
            "Times that a sequence lost its pages to another.",
            |s| s.preemptions,
        ),
        ("lite_llm_spec_decode_num_draft_tokens_total", "Tokens that were guessed.", |s| s.guessed),
        (
            "lite_llm_spec_decode_num_accepted_tokens_total",
            "Guessed tokens that were right.",
            |s| s.guessed_right,
        ),
        (
            "lite_llm_spec_decode_num_rejected_tokens_total",
            "Guessed tokens that were wrong.",
            |s| s.guessed.saturating_sub(s.guessed_right),
        ),
    ];
    let nodes = || nodes.iter().take(NODES_MAX);
    for (name, help, of) in gauges {
        let gauge = GaugeVec::new(Opts::new(name, help), &["node"])?;
        registry.register(Box::new(gauge.clone()))?;
        for node in nodes() {
            gauge.with_label_values(&[node.name.as_str()]).set(of(&node.schedule) as f64);
        }
    }
    for (name, help, of) in counters {
        let counter = IntCounterVec::new(Opts::new(name, help), &["node"])?;
        registry.register(Box::new(counter.clone()))?;
        for node in nodes() {
            counter.with_label_values(&[node.name.as_str()]).inc_by(of(&node.schedule));
        }
    }
    Ok(())
}
