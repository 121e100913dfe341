//! Logs to standard error; spans, where asked for, to an OTLP receiver.
//!
//! Spans of this project are at debug level and are recorded only when there is a receiver: a
//! process without one pays for a disabled check per span and nothing else.

use std::{io::IsTerminal, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider},
};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

pub use lite_llm_actors::trace::context_of;

/// Spans that may wait for the receiver; more are dropped, never waited for.
const SPANS_WAITING_MAX: usize = 65_536;
/// What of this project is traced.
const TRACED: &str = "lite_llm_runtime=debug,lite_llm_actors=debug,lite_llm_cluster=debug";

/// What is logged of the libraries below us, unless the filter names them. Spans around every
/// message say nothing to a user, and what the actor libraries warn of, our actors report.
const QUIET: &str = "ractor=error,ractor_cluster=error,quinn=warn,quinn_proto=warn,rustls=warn,\
                     h2=warn,tonic=warn,hyper=warn,hyper_util=warn,tower=warn,opentelemetry=warn";

/// Running telemetry.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Starts logging by `filter`, and tracing to `otlp` if given, as what this process is in its
/// cluster. Called within a tokio runtime.
pub fn start(filter: &str, otlp: Option<&str>, role: &str) -> anyhow::Result<Telemetry> {
    let filter: EnvFilter = format!("{QUIET},{filter}")
        .parse()
        .map_err(|error| anyhow::anyhow!("--log {filter}: {error}"))?;
    let provider = otlp.map(|endpoint| provider(endpoint, role)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("lite-llm"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(EnvFilter::new(TRACED))
    });
    let logs = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // It would say so with `eprintln!`, which panics where standard error is what has gone.
        .log_internal_errors(false)
        .with_filter(filter);
    // A second start in one process (in tests) keeps the first one's subscriber.
    let _ = tracing_subscriber::registry().with(traces).with(logs).try_init();
    Ok(Telemetry { provider })
}

fn provider(endpoint: &str, role: &str) -> anyhow::Result<SdkTracerProvider> {
    let exporter =
        SpanExporter::builder().with_tonic().with_endpoint(endpoint).build().map_err(|error| {
            anyhow::anyhow!("--otlp {endpoint}: {error}; http://host:port is expected")
        })?;
    let batches = BatchConfigBuilder::default().with_max_queue_size(SPANS_WAITING_MAX).build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    let resource = Resource::builder()
        .with_service_name(format!("lite-llm {role}"))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
        .build();
    Ok(SdkTracerProvider::builder().with_span_processor(processor).with_resource(resource).build())
}

impl Telemetry {
    /// Sends what is left, for so long at most.
    pub fn finish(self, limit: Duration) {
        if let Some(provider) = self.provider
            && let Err(error) = provider.shutdown_with_timeout(limit)
        {
            remark!("warning: the last traces were not sent: {error}");
        }
    }
}
