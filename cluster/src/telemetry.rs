//! Logs to standard error, as text or JSON; spans, where asked for, to an OTLP receiver.
//!
//! Spans of this project are at debug level and are recorded only when there is a receiver: a
//! process without one pays for a disabled check per span and nothing else.

use std::{fmt, io::IsTerminal, str::FromStr, sync::OnceLock, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider},
};
use serde_json::{Map, Value};
use tracing::{
    Event, Span, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

pub use lite_llm_actors::trace::context_of;

/// Spans that may wait for the receiver; more are dropped, never waited for.
const SPANS_WAITING_MAX: usize = 65_536;
/// What of this project is traced.
const TRACED: &str = "lite_llm_runtime=debug,lite_llm_actors=debug,lite_llm_cluster=debug";

/// What is logged of the libraries below us, unless the filter names them. Spans around every
/// message say nothing to a user, and what the actor libraries warn of, our actors report.
const QUIET: &str = "ractor=error,ractor_cluster=error,quinn=warn,quinn_proto=warn,rustls=warn,\
                     h2=warn,tonic=warn,hyper=warn,hyper_util=warn,tower=warn,opentelemetry=warn";

/// How a line of the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object, with the ids of trace and span if it is traced.
    Json,
}

/// Running telemetry.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Where traces and metrics of this process go, and what it is there.
#[derive(Debug, Clone)]
pub(crate) struct Receiver {
    /// An OTLP gRPC endpoint.
    pub(crate) url: String,
    /// Attributes of this process.
    pub(crate) resource: Vec<(String, String)>,
}

static RECEIVER: OnceLock<Receiver> = OnceLock::new();

/// The receiver that this process was started with.
pub(crate) fn receiver() -> Option<Receiver> {
    RECEIVER.get().cloned()
}

/// The part of all traces that is kept, of 1.
///
/// It is chosen where a trace begins, by the trace's id; all processes that a trace goes through keep it
/// or do not, as that one has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share(f64);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Self(share)),
            _ => Err("a number from 0 (no traces) to 1 (all) is expected, such as 0.1".into()),
        }
    }
}

impl Share {
    /// Traces that begin here are kept by this share, others as where they began.
    fn sampler(self) -> Sampler {
        Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(self.0)))
    }
}

/// Starts logging by `filter`, and tracing to `otlp` if given, as what this process is in its
/// cluster. Without a share of traces, the variables of OpenTelemetry (`OTEL_TRACES_SAMPLER`) say which
/// are kept: all, unless told. Called within a tokio runtime.
pub fn start(
    filter: &str,
    format: LogFormat,
    (otlp, share): (Option<&str>, Option<Share>),
    role: &str,
) -> anyhow::Result<Telemetry> {
    let filter: EnvFilter = format!("{QUIET},{filter}")
        .parse()
        .map_err(|error| anyhow::anyhow!("--log {filter}: {error}"))?;
    let receiver = otlp.map(|url| Receiver { url: url.to_owned(), resource: resource(role) });
    let provider = receiver.as_ref().map(|receiver| provider(receiver, share)).transpose()?;
    if let Some(receiver) = receiver {
        // A second start in one process (in tests) keeps the first one's.
        let _ = RECEIVER.set(receiver);
    }
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
        .with_ansi(format == LogFormat::Text && std::io::stderr().is_terminal())
        .with_target(false)
        // It would say so with `eprintln!`, which panics where standard error is what has gone.
        .log_internal_errors(false);
    let logs = match format {
        LogFormat::Text => logs.boxed(),
        LogFormat::Json => logs.event_format(JsonLines).boxed(),
    };
    // A second start in one process (in tests) keeps the first one's subscriber.
    let _ = tracing_subscriber::registry().with(traces).with(logs.with_filter(filter)).try_init();
    Ok(Telemetry { provider })
}

/// One object a line: when, how grave, where, what, its values, and what it belongs to.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut values = Values::default();
        event.record(&mut values);
        let mut line = Map::new();
        line.insert("timestamp".into(), time.into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        line.insert("message".into(), values.message.into());
        if !values.others.is_empty() {
            line.insert("fields".into(), values.others.into());
        }
        let context = context_of(&Span::current());
        if context.is_valid() {
            let text = context.to_string();
            let mut parts = text.split('-').skip(1);
            for name in ["trace_id", "span_id"] {
                line.insert(name.into(), parts.next().unwrap_or_default().into());
            }
        }
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// The values of an event.
#[derive(Default)]
struct Values {
    message: String,
    others: Map<String, Value>,
}

impl Values {
    fn put(&mut self, field: &Field, value: Value) {
        self.others.insert(field.name().to_owned(), value);
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            _ => self.put(field, format!("{value:?}").into()),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            _ => self.put(field, value.into()),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

/// What this process is to those who receive its traces and metrics.
fn resource(role: &str) -> Vec<(String, String)> {
    let attributes = [
        ("service.name", "lite-llm"),
        ("service.instance.id", role),
        ("service.version", env!("CARGO_PKG_VERSION")),
    ];
    attributes.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn provider(receiver: &Receiver, share: Option<Share>) -> anyhow::Result<SdkTracerProvider> {
    let endpoint = &receiver.url;
    let exporter =
        SpanExporter::builder().with_tonic().with_endpoint(endpoint).build().map_err(|error| {
            anyhow::anyhow!("--otlp {endpoint}: {error}; http://host:port is expected")
        })?;
    let batches = BatchConfigBuilder::default().with_max_queue_size(SPANS_WAITING_MAX).build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    let attributes = receiver.resource.iter().cloned();
    let attributes = attributes.map(|(key, value)| KeyValue::new(key, value));
    let resource = Resource::builder()
        .with_attributes(attributes)
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
        .build();
    let builder = SdkTracerProvider::builder();
    let builder = match share {
        Some(share) => builder.with_sampler(share.sampler()),
        None => builder,
    };
    Ok(builder.with_span_processor(processor).with_resource(resource).build())
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
