//! Metrics of Prometheus, sent to an OTLP receiver: the same names, labels and values.
//!
//! Invariants: nothing waits for the receiver but this task; what cannot be sent is left out, for the
//! next report holds all totals again.

use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::{
        ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient,
    },
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric, number_data_point,
    },
    resource::v1::Resource,
};
use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::{Channel, Endpoint};
use tracing::warn;

use crate::{telemetry::Receiver, time::nanos};

/// How often it is sent, unless the environment says.
const INTERVAL: Duration = Duration::from_secs(60);
/// In milliseconds, as for all who speak OpenTelemetry.
const INTERVAL_VARIABLE: &str = "OTEL_METRIC_EXPORT_INTERVAL";
/// How long a report may take.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Where reports go.
pub(crate) struct Reports {
    channel: Channel,
    to: Receiver,
    /// When the sums began, in nanoseconds.
    begun: u64,
}

impl Reports {
    /// Connects when the first report is sent; nothing, with a word in the log, if that cannot be an address.
    pub(crate) fn new(to: Receiver) -> Option<Self> {
        let channel = match Endpoint::from_shared(to.url.clone()) {
            Ok(endpoint) => endpoint.connect_timeout(SEND_TIMEOUT).connect_lazy(),
            Err(error) => {
                warn!(%error, "metrics are not sent to {}", to.url);
                return None;
            }
        };
        Some(Self { channel, to, begun: nanos() })
    }

    /// Sends what is gathered now and then until it is aborted. Says once when that fails.
    pub(crate) async fn export<G>(&self, gather: impl Fn() -> G)
    where
        G: Future<Output = Result<Vec<MetricFamily>>>,
    {
        let said = std::env::var(INTERVAL_VARIABLE).ok().and_then(|text| text.parse().ok());
        let every = said.filter(|ms| *ms > 0).map_or(INTERVAL, Duration::from_millis);
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            ticks.tick().await;
            let sent = timeout(SEND_TIMEOUT, async { self.send(&gather().await?).await }).await;
            let slow = |_| Err(anyhow::anyhow!("no answer within {SEND_TIMEOUT:?}"));
            match sent.unwrap_or_else(slow) {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    warn!("metrics are not taken by {}: {error:#}", self.to.url);
                }
                Err(_) => {}
            }
        }
    }

    /// Sends one report.
    pub(crate) async fn send(&self, families: &[MetricFamily]) -> Result<()> {
        let metrics = families.iter().map(|family| metric(family, self.begun, nanos())).collect();
        let scope =
            InstrumentationScope { name: "lite-llm".into(), ..InstrumentationScope::default() };
        let scope_metrics = ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() };
        let attributes = self.to.resource.iter().map(|(key, value)| text(key, value)).collect();
        let report = ResourceMetrics {
            resource: Some(Resource { attributes, ..Resource::default() }),
            scope_metrics: vec![scope_metrics],
            ..ResourceMetrics::default()
        };
        let request = ExportMetricsServiceRequest { resource_metrics: vec![report] };
        let mut client = MetricsServiceClient::new(self.channel.clone());
        client.export(request).await.context("the receiver refuses")?;
        Ok(())
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    let value = any_value::Value::StringValue(value.to_owned());
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

/// A family of Prometheus as OTLP has it: counters are cumulative sums.
fn metric(family: &MetricFamily, begun: u64, now: u64) -> Metric {
    let points = |value: fn(&proto::Metric) -> f64| {
        let point = move |one: &proto::Metric| NumberDataPoint {
            attributes: labels(one.get_label()),
            start_time_unix_nano: begun,
            time_unix_nano: now,
            value: Some(number_data_point::Value::AsDouble(value(one))),
            ..NumberDataPoint::default()
        };
        family.get_metric().iter().map(point).collect()
    };
    let temporality = AggregationTemporality::Cumulative.into();
    let data = match family.get_field_type() {
        MetricType::COUNTER => metric::Data::Sum(Sum {
            data_points: points(|one| one.get_counter().get_value()),
            aggregation_temporality: temporality,
            is_monotonic: true,
        }),
        MetricType::HISTOGRAM => {
            let points = family.get_metric().iter().map(|one| histogram(one, begun, now));
            metric::Data::Histogram(Histogram {
                data_points: points.collect(),
                aggregation_temporality: temporality,
            })
        }
        _ => metric::Data::Gauge(Gauge { data_points: points(|one| one.get_gauge().get_value()) }),
    };
    Metric {
        name: family.name().to_owned(),
        description: family.help().to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn labels(labels: &[LabelPair]) -> Vec<KeyValue> {
    labels.iter().map(|label| text(label.name(), label.value())).collect()
}

/// Buckets of Prometheus hold all below their bound, those of OTLP what is between two; the last has no
/// bound.
fn histogram(one: &proto::Metric, begun: u64, now: u64) -> HistogramDataPoint {
    let histogram = one.get_histogram();
    let bounded = histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite());
    let (mut bounds, mut counts, mut below) = (Vec::new(), Vec::new(), 0);
    for bucket in bounded {
        bounds.push(bucket.upper_bound());
        counts.push(bucket.cumulative_count().saturating_sub(below));
        below = bucket.cumulative_count();
    }
    let count = histogram.get_sample_count();
    counts.push(count.saturating_sub(below));
    HistogramDataPoint {
        attributes: labels(one.get_label()),
        start_time_unix_nano: begun,
        time_unix_nano: now,
        count,
        sum: Some(histogram.get_sample_sum()),
        bucket_counts: counts,
        explicit_bounds: bounds,
        ..HistogramDataPoint::default()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, Registry};

    use super::*;

    #[test]
    fn buckets_are_taken_apart() {
        let registry = Registry::new();
        let options = HistogramOpts::new("h", "help").buckets(vec![1.0, 2.0, 4.0]);
        let observed = prometheus::Histogram::with_opts(options).unwrap();
        registry.register(Box::new(observed.clone())).unwrap();
        [0.5, 1.5, 1.6, 3.0, 9.0].into_iter().for_each(|value| observed.observe(value));
        let metric = metric(&registry.gather()[0], 1, 2);
        let Some(metric::Data::Histogram(data)) = metric.data else { panic!("{metric:?}") };
        let point = &data.data_points[0];
        assert_eq!(point.explicit_bounds, [1.0, 2.0, 4.0]);
        assert_eq!(point.bucket_counts, [1, 2, 1, 1]);
        assert_eq!((point.count, point.sum), (5, Some(15.6)));
    }
}
