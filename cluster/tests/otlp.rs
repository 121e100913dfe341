//! One job is one trace: a cluster of processes sends its spans to a real OTLP receiver, and the
//! tree shows submit → coordinator → node → pass → layer → route, dispatch → remote shard, combine.

mod process;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{Read, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    metrics::v1::{Metric, metric, number_data_point},
    resource::v1::Resource,
    trace::v1::Span,
};
use process::{Cluster, PATIENCE};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// A span, and the process that it came from: its role, and its name if it has one.
type Received = (String, Span);

/// The published OTLP service, keeping what it is sent.
#[derive(Clone, Default)]
struct Receiver {
    spans: Arc<Mutex<Vec<Received>>>,
    /// The last report of metrics.
    metrics: Arc<Mutex<(String, Vec<Metric>)>>,
}

/// Which process a report came from. All are one service.
fn process_of(resource: Option<Resource>) -> String {
    let attributes = resource.unwrap_or_default().attributes;
    let of = |key: &str| {
        let found = attributes.iter().find(|a| a.key == key);
        match found.and_then(|a| a.value.clone()).and_then(|v| v.value) {
            Some(Value::StringValue(text)) => text,
            other => panic!("{key} is {other:?}"),
        }
    };
    assert_eq!(
        (&*of("service.name"), &*of("service.version")),
        ("lite-llm", env!("CARGO_PKG_VERSION"))
    );
    let instance = of("service.instance.id");
    // Commands are told apart by the number of their process.
    match instance.rsplit_once(' ') {
        Some((role, number)) if number.bytes().all(|c| c.is_ascii_digit()) => role.to_owned(),
        _ => instance,
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let name = process_of(resource.resource);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| (name.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Receiver {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for resource in request.into_inner().resource_metrics {
            let name = process_of(resource.resource);
            let metrics = resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            *self.metrics.lock().unwrap() = (name, metrics.collect());
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
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

    /// The same, for metrics alone.
    async fn listen_for_metrics(&self) -> String {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let service = MetricsServiceServer::new(self.clone());
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
            "job" => assert_eq!(services, ("submit", "coordinator")),
            "node" => assert_eq!(services, ("coordinator", "worker a")),
            "expert shard" => {
                assert_eq!(services, ("worker a", "worker b"), "not remote");
            }
            _ => assert_eq!(services.0, services.1, "{}", span.name),
        }
    }
    counts_are_plausible(&count(&spans));
    let said = gen_ai(spans.iter().find(|(_, span)| span.name == "job").unwrap());
    assert_eq!(said["gen_ai.operation.name"], Value::StringValue("text_completion".into()));
    assert_eq!(said["gen_ai.request.max_tokens"], Value::IntValue(TOKENS as i64));
    assert_eq!(said["gen_ai.request.temperature"], Value::DoubleValue(0.0));
    assert_eq!(said["gen_ai.usage.output_tokens"], Value::IntValue(TOKENS as i64));
    assert!(matches!(said["gen_ai.usage.input_tokens"], Value::IntValue(1..)), "{said:?}");
    assert_eq!(words(&said["gen_ai.response.finish_reasons"]), ["length"]);
    let mut others = spans.iter().filter(|(_, span)| span.name != "job");
    assert!(others.all(|received| gen_ai(received).is_empty()));
}

/// What a span says of a request to a model, in the words of the conventions.
fn gen_ai((_, span): &Received) -> BTreeMap<&str, Value> {
    let ours = span.attributes.iter().filter(|attribute| attribute.key.starts_with("gen_ai."));
    let value = |attribute: &KeyValue| attribute.value.clone().and_then(|value| value.value);
    ours.map(|attribute| (&*attribute.key, value(attribute).unwrap())).collect()
}

fn words(list: &Value) -> Vec<String> {
    let Value::ArrayValue(list) = list else { panic!("{list:?}") };
    let word = |value: &AnyValue| match &value.value {
        Some(Value::StringValue(word)) => word.clone(),
        other => panic!("{other:?}"),
    };
    list.values.iter().map(word).collect()
}

#[test]
fn a_request_over_http_says_what_it_asked_for_and_used() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen());
    let args = ["run", "--http", "127.0.0.1:0", "--http-model", "demo", "--otlp", &url];
    let mut server = process::Process::start(&args);
    server.says("http on ");
    let said = server.out();
    let address = said.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    let body = r#"{"messages":[{"role":"user","content":"ls"}],"n":2,"max_tokens":5,"seed":7,
                   "temperature":0.5,"top_p":0.9,"ignore_eos":true}"#;
    let mut stream = std::net::TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json";
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let json = text.split_once("\r\n\r\n").unwrap().1;
    let told: serde_json::Value = serde_json::from_str(json).unwrap();
    server.signal("TERM");
    server.ends_within(PATIENCE).expect(0, &[]);
    runtime.shutdown_timeout(Duration::from_secs(1));
    let spans = std::mem::take(&mut *receiver.spans.lock().unwrap());
    let said: Vec<_> = spans.iter().filter(|received| !gen_ai(received).is_empty()).collect();
    let [span] = &said[..] else { panic!("one span says it: {:?}", count(&spans)) };
    assert_eq!(span.1.name, "http");
    let said = gen_ai(span);
    assert_eq!(said["gen_ai.operation.name"], Value::StringValue("chat".into()));
    assert_eq!(said["gen_ai.request.model"], Value::StringValue("demo".into()));
    assert_eq!(said["gen_ai.request.seed"], Value::IntValue(7));
    assert_eq!(said["gen_ai.request.temperature"], Value::DoubleValue(0.5));
    assert!(
        matches!(said["gen_ai.request.top_p"], Value::DoubleValue(p) if (p - 0.9).abs() < 1e-6)
    );
    let input = told["usage"]["prompt_tokens"].as_i64().unwrap();
    assert_eq!(said["gen_ai.usage.input_tokens"], Value::IntValue(input));
    assert_eq!(said["gen_ai.usage.output_tokens"], Value::IntValue(10));
    assert_eq!(words(&said["gen_ai.response.finish_reasons"]), ["length", "length"]);
}

#[test]
fn a_share_of_traces_is_chosen_where_they_begin() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen());
    // The coordinator begins none, but goes on with those that `submit` has begun.
    let own = ["--trace-sample", "0"];
    let cluster = Cluster::ready_with(&["a"], &["--otlp", &url], &own);
    let job = ["--max-tokens", "3", "ls - list"];
    cluster.submit(&job).ends_within(PATIENCE).expect(0, &[]);
    let token = cluster.token();
    process::run(&[&["submit", "--token", &token][..], &job].concat()).expect(0, &[]);
    for (_, worker) in cluster.workers {
        worker.signal("TERM");
        worker.ends_within(PATIENCE).expect(0, &[]);
    }
    cluster.coordinator.signal("TERM");
    cluster.coordinator.ends_within(PATIENCE).expect(0, &[]);
    runtime.shutdown_timeout(Duration::from_secs(1));
    let spans = std::mem::take(&mut *receiver.spans.lock().unwrap());
    let counts = count(&spans);
    assert_eq!((counts["submit"], counts["job"], counts["node"]), (1, 1, 1), "{counts:?}");
    for share in ["1.5", "-1", "some"] {
        let args = ["run".to_owned(), format!("--trace-sample={share}"), "hi".to_owned()];
        process::run(&args).one_error(2, &["--trace-sample", "from 0 (no traces) to 1 (all)"]);
    }
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

/// The value of a metric without labels that matter; a histogram's is its count.
fn value(metrics: &[Metric], name: &str) -> Option<f64> {
    let metric = metrics.iter().find(|metric| metric.name == name)?;
    let number = |point: &number_data_point::Value| match point {
        number_data_point::Value::AsDouble(value) => *value,
        number_data_point::Value::AsInt(value) => *value as f64,
    };
    match metric.data.as_ref()? {
        metric::Data::Sum(sum) => sum.data_points.first()?.value.as_ref().map(number),
        metric::Data::Gauge(gauge) => gauge.data_points.first()?.value.as_ref().map(number),
        metric::Data::Histogram(data) => data.data_points.first().map(|point| point.count as f64),
        _ => None,
    }
}

#[test]
fn metrics_are_those_of_prometheus() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen_for_metrics());
    let flags = ["run", "--http", "127.0.0.1:0", "--otlp", &url];
    let flags = [&flags[..], &["--log-format", "json", "--log", "lite_llm_cluster=debug"]].concat();
    let mut server =
        process::Process::start_with_variables(&flags, &[("OTEL_METRIC_EXPORT_INTERVAL", "100")]);
    server.says("http on ");
    let said = server.out();
    let address = said.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    let ask = |request: String| {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    let head = "Host: localhost\r\nConnection: close\r\n";
    let body = r#"{"prompt":"ls - list","max_tokens":5,"ignore_eos":true}"#;
    let length = body.len();
    ask(format!(
        "POST /v1/completions HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    ));
    let play = r#"{"prompt":"ls - list","max_tokens":3,"temperature":0,"seed":1,"tiers":"all"}"#;
    let begun = Instant::now();
    let metrics = loop {
        let (process, metrics) = receiver.metrics.lock().unwrap().clone();
        // The request is counted when it was answered.
        if value(&metrics, "lite_llm_http_requests_total") == Some(1.0) {
            assert_eq!(process, "run");
            break metrics;
        }
        assert!(begun.elapsed() < PATIENCE, "the last report: {metrics:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    // The same names, and the same counts, as Prometheus is told.
    let text = ask(format!("GET /metrics HTTP/1.1\r\n{head}\r\n"));
    let told: HashSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let sent: HashSet<&str> = metrics.iter().map(|metric| &*metric.name).collect();
    let missing: Vec<_> = told.symmetric_difference(&sent).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert_eq!(value(&metrics, "lite_llm_generation_tokens_total"), Some(5.0));
    assert_eq!(value(&metrics, "lite_llm_inter_token_latency_seconds"), Some(4.0));
    assert_eq!(value(&metrics, "lite_llm_nodes"), Some(1.0));

    // And the dashboard asks for nothing that there is not.
    let dashboard = include_str!("../../packaging/grafana.json");
    serde_json::from_str::<serde_json::Value>(dashboard).unwrap();
    let names = dashboard.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let names: HashSet<&str> = names.filter(|name| name.starts_with("lite_llm_")).collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        let family = name.strip_suffix("_bucket").unwrap_or(name);
        assert!(told.contains(family), "packaging/grafana.json: there is no {name}");
    }

    let length = play.len();
    let played = ask(format!(
        "POST /playground HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{play}"
    ));
    // Three tokens, each with the experts of five layers.
    let tokens: Vec<serde_json::Value> = played
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .filter(|said: &serde_json::Value| said["token"].is_u64())
        .collect();
    assert_eq!(tokens.len(), 3, "{played}");
    for token in tokens {
        let experts = token["experts"].as_array().unwrap();
        assert!(
            experts.len() == LAYERS && experts.iter().all(|layer| layer[1].is_u64()),
            "{token}"
        );
    }

    server.signal("TERM");
    let ended = server.ends_within(PATIENCE);
    ended.expect(0, &[]);
    // Each line of the log is an object; beside them the command says what it serves.
    let lines = ended.err.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<serde_json::Value> =
        lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
    }
    let line = lines.iter().find(|line| line["message"] == "let in from the page");
    let line = line.unwrap_or_else(|| panic!("{}", ended.err));
    assert_eq!(line["fields"]["most"], 3, "{line}");
    for (id, digits) in [("trace_id", 32), ("span_id", 16)] {
        let id = line[id].as_str().unwrap_or_else(|| panic!("{line}"));
        assert!(id.len() == digits && id.bytes().all(|c| c.is_ascii_hexdigit()), "{line}");
    }
}

/// Whoever names a receiver wants its metrics, whether it has an API or not.
#[test]
fn a_coordinator_without_an_api_sends_its_metrics() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen_for_metrics());
    let (state, model) = (tempfile::tempdir().unwrap(), process::demo_model());
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--otlp", &url, "--model"];
    let more = [model.to_str().unwrap(), "--state", state.path().to_str().unwrap()];
    let flags = [&args[..], &more].concat();
    let coordinator =
        process::Process::start_with_variables(&flags, &[("OTEL_METRIC_EXPORT_INTERVAL", "100")]);
    let begun = Instant::now();
    loop {
        let (process, metrics) = receiver.metrics.lock().unwrap().clone();
        if value(&metrics, "lite_llm_nodes") == Some(0.0) {
            assert_eq!(process, "coordinator");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "the last report: {metrics:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    coordinator.signal("TERM");
    coordinator.ends_within(PATIENCE).expect(0, &[]);
}

/// A step of a training is one trace over the run and its workers, which call each other; its numbers are metrics.
#[test]
fn a_step_of_training_is_one_trace_over_its_workers() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = Receiver::default();
    let url = runtime.block_on(receiver.listen());
    let dir = tempfile::tempdir().unwrap();
    let text: String =
        (0..300).map(|i| format!("Line {i} of a text about {}. ", i * i % 17)).collect();
    std::fs::write(dir.path().join("text.txt"), text).unwrap();
    let config = format!(
        r#"out = "run"
        [model.new]
        tokenizer = {:?}
        hidden = 16
        layers = 2
        heads = 2
        kv_heads = 1
        head_dim = 8
        context = 32
        intermediate = 8
        routes = [1, 1, 2]
        tiers = [{{ name = "tier_1b", groups = 1, experts = 4 }}]
        [data]
        files = ["text.txt"]
        sequence = 16
        batch = 4
        held_out = 0.1
        [[phase]]
        name = "0"
        train = {{ backbone = true, tiers = ["all"] }}
        steps = 2
        lr = 1e-3
        "#,
        process::demo_model()
    );
    let path = dir.path().join("run.toml");
    std::fs::write(&path, config).unwrap();
    let args = ["--otlp", &url, "train", path.to_str().unwrap(), "--workers", "2"];
    process::Process::start(&args).ends_within(PATIENCE).expect(0, &[]);
    runtime.shutdown_timeout(Duration::from_secs(1));
    let spans = std::mem::take(&mut *receiver.spans.lock().unwrap());
    let steps: Vec<&Received> = spans.iter().filter(|(_, s)| s.name == "training step").collect();
    assert!(steps.len() >= 2, "{:?}", count(&spans));
    let mut whole = 0;
    for (_, step) in steps {
        let of = |name: &str| -> HashSet<&str> {
            let here = spans.iter().filter(|(_, s)| s.trace_id == step.trace_id && s.name == name);
            here.map(|(process, _)| process.as_str()).collect()
        };
        // The last has no step: the run is over.
        if of("gradients").is_empty() {
            continue;
        }
        whole += 1;
        let workers = HashSet::from(["train worker w1", "train worker w2"]);
        for name in ["gradients", "serve", "prepare", "apply"] {
            assert_eq!(of(name), workers, "{name}");
        }
    }
    assert_eq!(whole, 2);
}
