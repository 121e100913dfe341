//! One job is one trace: a cluster of processes sends its spans to a real OTLP receiver, and the
//! tree shows submit → coordinator → node → pass → layer → route, dispatch → remote shard, combine.

mod process;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use process::{Cluster, PATIENCE};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// A span, and the service that it came from.
type Received = (String, Span);

/// The published OTLP service, keeping what it is sent.
#[derive(Clone, Default)]
struct Receiver {
    spans: Arc<Mutex<Vec<Received>>>,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = attributes.into_iter().find(|a| a.key == "service.name");
            let name = match name.and_then(|a| a.value).and_then(|v| v.value) {
                Some(Value::StringValue(name)) => name,
                other => panic!("service.name is {other:?}"),
            };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| (name.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    /// Listens; returns where.
    async fn listen(&self) -> String {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let service = TraceServiceServer::new(self.clone());
        tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
        format!("http://{address}")
    }
}

/// Layers of the demo model.
const LAYERS: usize = 5;
/// Tokens that the job generates.
const TOKENS: usize = 6;

/// Under which span each span belongs.
const PARENTS: [(&str, &str); 11] = [
    ("job", "submit"),
    ("node", "job"),
    ("pass", "node"),
    ("layer", "pass"),
    ("attention", "layer"),
    ("route", "layer"),
    ("dispatch", "layer"),
    ("expert shard", "dispatch"),
    ("experts", "layer"),
    ("combine", "layer"),
    ("logits", "pass"),
];

/// What all processes of a cluster sent for one job, and nothing else.
fn spans_of_one_job() -> Vec<Received> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen());
    let cluster = Cluster::ready(&["a", "b"], &["--otlp", &url]);
    let tokens = TOKENS.to_string();
    let args = ["--max-tokens", &tokens, "--temperature", "0", "--ignore-eos", "ls - list"];
    cluster.submit(&args).ends_within(PATIENCE).expect(0, &["[6 tokens"]);
    // A process that is asked to end sends what it has, however it is asked.
    for ((_, worker), signal) in cluster.workers.into_iter().zip(["INT", "TERM"]) {
        worker.signal(signal);
        worker.ends_within(PATIENCE).expect(0, &[]);
    }
    cluster.coordinator.signal("TERM");
    cluster.coordinator.ends_within(PATIENCE).expect(0, &[]);
    runtime.shutdown_timeout(Duration::from_secs(1));
    std::mem::take(&mut *receiver.spans.lock().unwrap())
}

#[test]
fn one_job_is_one_trace_through_all_processes() {
    let spans = spans_of_one_job();
    let traces: HashSet<&[u8]> = spans.iter().map(|(_, span)| &span.trace_id[..]).collect();
    assert_eq!(traces.len(), 1, "{:?}", count(&spans));

    let by_id: HashMap<&[u8], &Received> =
        spans.iter().map(|received| (&received.1.span_id[..], received)).collect();
    assert_eq!(by_id.len(), spans.len(), "a span came twice");
    for (service, span) in &spans {
        let parent = by_id.get(&span.parent_span_id[..]);
        let Some((_, expected)) = PARENTS.iter().find(|(name, _)| *name == span.name) else {
            assert_eq!(
                (span.name.as_str(), parent),
                ("submit", None),
                "only `submit` has no parent"
            );
            continue;
        };
        let Some((above, parent)) = parent else {
            panic!("the parent of {} from {service} is missing", span.name);
        };
        assert_eq!(parent.name, *expected, "{} from {service}", span.name);
        assert!(parent.start_time_unix_nano <= span.start_time_unix_nano, "{}", span.name);
        let services = (above.as_str(), service.as_str());
        match span.name.as_str() {
            "job" => assert_eq!(services, ("lite-llm submit", "lite-llm coordinator")),
            "node" => assert_eq!(services, ("lite-llm coordinator", "lite-llm worker a")),
            "expert shard" => {
                assert_eq!(services, ("lite-llm worker a", "lite-llm worker b"), "not remote");
            }
            _ => assert_eq!(services.0, services.1, "{}", span.name),
        }
    }
    counts_are_plausible(&count(&spans));
}

fn count(spans: &[Received]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    spans.iter().for_each(|(_, span)| *counts.entry(span.name.as_str()).or_default() += 1);
    counts
}

fn counts_are_plausible(counts: &BTreeMap<&str, usize>) {
    let of = |name: &str| counts.get(name).copied().unwrap_or(0);
    for name in ["submit", "job", "node"] {
        assert_eq!(of(name), 1, "{counts:?}");
    }
    // One pass per token: the prompt is short enough for one.
    assert_eq!((of("pass"), of("logits")), (TOKENS, TOKENS), "{counts:?}");
    for name in ["layer", "attention", "route", "dispatch", "combine"] {
        assert_eq!(of(name), TOKENS * LAYERS, "{name}: {counts:?}");
    }
    // Half of the experts are elsewhere: nearly every layer has calls here and there.
    for name in ["experts", "expert shard"] {
        assert!((TOKENS..=TOKENS * LAYERS).contains(&of(name)), "{name}: {counts:?}");
    }
}

#[test]
fn a_receiver_that_is_not_there_costs_no_answer() {
    let args = ["--otlp", "http://127.0.0.1:9", "--max-tokens", "3", "ls - list"];
    let ended = process::run(&[&["run"][..], &args].concat());
    ended.expect(0, &["[3 tokens"]);
    process::run(&["run", "--otlp", "not a url", "hi"]).one_error(2, &["--otlp not a url", "http"]);
}
