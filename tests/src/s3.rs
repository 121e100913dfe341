//! An object store that a test starts, and that misbehaves when told to.
//!
//! It speaks as much of S3 as checkpoints need (ranges, listings, conditional and multipart uploads),
//! and answers plain HTTP requests for the same objects. Objects live in memory; threads and sockets
//! are those of the standard library.
//!
//! Signatures are not verified; with a key, requests must name it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

/// What a faulty server does instead of answering well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Closes the connection before it answers.
    Drop,
    /// Closes the connection after so many bytes of the answer's body.
    DropAfter(usize),
    /// Says that the answer is so many bytes shorter than it should be, and sends those.
    Short(usize),
    /// Answers a range with one that begins so many bytes later.
    Shifted(u64),
    /// Says that the object is larger by so many bytes than it is.
    WrongSize(u64),
    /// Changes one byte in the middle of the body.
    Corrupt,
    /// Sends the body at so many bytes per second.
    Slow(u64),
    /// Sends the body in pieces of so many bytes, each by itself.
    Pieces(usize),
    /// Takes the request, and never answers.
    Never,
    /// Answers that all is well, and in the body that it is not.
    ErrorWithin,
    /// Sends whole objects, whatever range is asked for.
    NoRanges,
    /// Does what it was asked, and closes the connection before it says so.
    DoneButSilent,
}

/// Which requests meet a fault.
#[derive(Debug, Clone)]
struct Rule {
    method: &'static str,
    /// Part of the key.
    key: String,
    fault: Fault,
    /// How often still.
    times: u64,
}

/// A request that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Such as `GET`.
    pub method: String,
    /// Bucket and key.
    pub key: String,
    /// Value of the `Range` header.
    pub range: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    objects: Mutex<BTreeMap<String, Arc<Vec<u8>>>>,
    uploads: Mutex<HashMap<String, BTreeMap<u32, Vec<u8>>>>,
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Seen>>,
    next_upload: AtomicU64,
    stopped: AtomicBool,
    key: Mutex<Option<String>>,
    now: Mutex<(usize, usize)>,
}

/// A running server; it ends with this.
#[derive(Debug)]
pub struct S3Server {
    state: Arc<State>,
    address: SocketAddr,
}

impl S3Server {
    /// Starts an empty one on a free port of the loopback interface.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let state = Arc::new(State::default());
        let served = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if served.stopped.load(SeqCst) {
                    return;
                }
                let (Ok(stream), state) = (stream, served.clone()) else { continue };
                thread::spawn(move || {
                    // A peer that leaves ends its connection's thread.
                    let _ = serve(&state, stream);
                });
            }
        });
        Self { state, address }
    }

    /// Variables that point a client here.
    pub fn environment(&self) -> Vec<(String, String)> {
        let variables = [
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ACCESS_KEY_ID", "TESTKEY".into()),
            ("AWS_SECRET_ACCESS_KEY", "hunter2".into()),
            ("AWS_REGION", "us-east-1".into()),
        ];
        variables.map(|(key, value)| (key.to_owned(), value)).into()
    }

    /// URL of a bucket and key for plain HTTP.
    pub fn http(&self, key: &str) -> String {
        format!("http://{}/{key}", self.address)
    }

    /// Requests must name this access key.
    pub fn require_key(&self, key: &str) {
        *self.state.key.lock().unwrap() = Some(key.to_owned());
    }

    /// Puts the files below a folder under `bucket/prefix`.
    pub fn put_folder(&self, at: &str, folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let at = format!("{at}/{}", entry.file_name().to_str().unwrap());
            match entry.path().is_dir() {
                true => self.put_folder(&at, &entry.path()),
                false => self.put(&at, std::fs::read(entry.path()).unwrap()),
            }
        }
    }

    /// Puts an object: bucket, `/` and key.
    pub fn put(&self, key: &str, bytes: Vec<u8>) {
        self.state.objects.lock().unwrap().insert(key.to_owned(), Arc::new(bytes));
    }

    /// An object.
    pub fn get(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        self.state.objects.lock().unwrap().get(key).cloned()
    }

    /// Removes an object.
    pub fn remove(&self, key: &str) {
        self.state.objects.lock().unwrap().remove(key);
    }

    /// All keys, with their buckets.
    pub fn keys(&self) -> Vec<String> {
        self.state.objects.lock().unwrap().keys().cloned().collect()
    }

    /// Multipart uploads that were begun and neither completed nor aborted.
    pub fn unfinished_uploads(&self) -> usize {
        self.state.uploads.lock().unwrap().len()
    }

    /// The next `times` requests of a method for keys that contain `key` meet a fault.
    pub fn fail(&self, method: &'static str, key: &str, fault: Fault, times: u64) {
        let rule = Rule { method, key: key.to_owned(), fault, times };
        self.state.rules.lock().unwrap().push(rule);
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.state.rules.lock().unwrap().clear();
    }

    /// Requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// Requests that were answered at the same time, at most, since the start.
    pub fn most_at_once(&self) -> usize {
        self.state.now.lock().unwrap().1
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.state.stopped.store(true, SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.address);
    }
}

struct Request {
    method: String,
    /// Bucket and key.
    key: String,
    query: BTreeMap<String, String>,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Arc<Vec<u8>>,
    range: std::ops::Range<usize>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = Arc::new(body.into());
        let range = 0..body.len();
        Self { status, headers: vec![], body, range }
    }

    fn error(status: u16, code: &str) -> Self {
        // What a client must not repeat.
        let message = "for TESTKEY, see https://x/?X-Amz-Signature=hunter2";
        Self::new(status, format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>"))
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

fn serve(state: &State, stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(1 << 16, stream.try_clone()?);
    let mut stream = stream;
    while let Some(request) = read_request(&mut reader)? {
        if state.stopped.load(SeqCst) {
            return Ok(());
        }
        state.seen.lock().unwrap().push(Seen {
            method: request.method.clone(),
            key: request.key.clone(),
            range: request.headers.get("range").cloned(),
        });
        {
            let mut now = state.now.lock().unwrap();
            now.0 += 1;
            now.1 = now.1.max(now.0);
        }
        let going_on = answer_one(state, &request, &mut stream);
        state.now.lock().unwrap().0 -= 1;
        if !going_on? {
            return Ok(());
        }
    }
    Ok(())
}

/// Answers; says whether the connection stays open.
fn answer_one(state: &State, request: &Request, stream: &mut TcpStream) -> std::io::Result<bool> {
    let fault = take_fault(state, request);
    match fault {
        Some(Fault::Drop) => return Ok(false),
        Some(Fault::Never) => {
            while !state.stopped.load(SeqCst) {
                thread::sleep(Duration::from_millis(20));
            }
            return Ok(false);
        }
        _ => {}
    }
    let refused = state.key.lock().unwrap().clone().is_some_and(|key| {
        let signed = request.headers.get("authorization");
        !signed.is_some_and(|header| header.contains(&format!("Credential={key}/")))
    });
    let mut answer = match fault {
        Some(Fault::Status(status)) => {
            let codes = [
                (403, "AccessDenied"),
                (404, "NoSuchKey"),
                (409, "ConditionalRequestConflict"),
                (416, "InvalidRange"),
                (503, "SlowDown"),
            ];
            let code = codes.iter().find(|(of, _)| *of == status);
            Answer::error(status, code.map_or("InternalError", |(_, code)| code))
        }
        Some(Fault::ErrorWithin) => Answer::error(200, "InternalError"),
        _ if refused => Answer::error(403, "InvalidAccessKeyId"),
        _ => respond(state, request, fault),
    };
    let (mut len, mut ends) = (answer.range.len(), false);
    match fault {
        Some(Fault::DoneButSilent) => return Ok(false),
        Some(Fault::Short(by)) => len = len.saturating_sub(by),
        Some(Fault::DropAfter(after)) => ends = after < len,
        Some(Fault::Corrupt) if len > 0 => {
            let mut body = (*answer.body).clone();
            body[answer.range.start + len / 2] ^= 0x20;
            answer.body = Arc::new(body);
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {len}\r\n\r\n"));
    stream.write_all(head.as_bytes())?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let sent = match fault {
        Some(Fault::DropAfter(after)) if ends => after,
        _ => len,
    };
    let body = &answer.body[answer.range.start..][..sent];
    match fault {
        Some(Fault::Slow(bytes_per_s)) => {
            for piece in body.chunks((bytes_per_s / 20).max(1) as usize) {
                if state.stopped.load(SeqCst) {
                    return Ok(false);
                }
                stream.write_all(piece)?;
                thread::sleep(Duration::from_millis(50));
            }
        }
        Some(Fault::Pieces(bytes)) => {
            for piece in body.chunks(bytes) {
                stream.write_all(piece)?;
                thread::sleep(Duration::from_millis(1));
            }
        }
        _ => stream.write_all(body)?,
    }
    Ok(!ends)
}

fn take_fault(state: &State, request: &Request) -> Option<Fault> {
    let mut rules = state.rules.lock().unwrap();
    let rule = rules.iter_mut().find(|rule| {
        rule.times > 0
            && (rule.method == "*" || rule.method == request.method)
            && request.key.contains(&rule.key)
    })?;
    rule.times -= 1;
    Some(rule.fault)
}

fn respond(state: &State, request: &Request, fault: Option<Fault>) -> Answer {
    let mut objects = state.objects.lock().unwrap();
    let asks = |name: &str| request.query.contains_key(name);
    match request.method.as_str() {
        "GET" if asks("list-type") => list(&objects, request),
        "GET" | "HEAD" => {
            let Some(body) = objects.get(&request.key).cloned() else {
                return Answer::error(404, "NoSuchKey");
            };
            drop(objects);
            get(body, request, fault)
        }
        "PUT" if asks("uploadId") => {
            let (id, part) = (&request.query["uploadId"], &request.query["partNumber"]);
            let mut uploads = state.uploads.lock().unwrap();
            let Some(parts) = uploads.get_mut(id) else {
                return Answer::error(404, "NoSuchUpload");
            };
            parts.insert(part.parse().unwrap(), request.body.clone());
            Answer::new(200, "").with("ETag", format!("\"{part}\""))
        }
        "PUT" => {
            let only_new = request.headers.get("if-none-match").is_some_and(|value| value == "*");
            if only_new && objects.contains_key(&request.key) {
                return Answer::error(412, "PreconditionFailed");
            }
            objects.insert(request.key.clone(), Arc::new(request.body.clone()));
            Answer::new(200, "").with("ETag", "\"x\"")
        }
        "POST" if asks("uploads") => {
            let id = state.next_upload.fetch_add(1, SeqCst).to_string();
            state.uploads.lock().unwrap().insert(id.clone(), BTreeMap::new());
            Answer::new(
                200,
                format!(
                    "<InitiateMultipartUploadResult><UploadId>{id}</UploadId>\
                     </InitiateMultipartUploadResult>"
                ),
            )
        }
        "POST" if asks("uploadId") => {
            let parts = state.uploads.lock().unwrap().remove(&request.query["uploadId"]);
            let Some(parts) = parts else { return Answer::error(404, "NoSuchUpload") };
            objects.insert(request.key.clone(), Arc::new(parts.into_values().flatten().collect()));
            Answer::new(
                200,
                "<CompleteMultipartUploadResult><ETag>\"x\"</ETag></CompleteMultipartUploadResult>",
            )
        }
        "POST" if asks("delete") => {
            let text = String::from_utf8_lossy(&request.body);
            let bucket = request.key.trim_end_matches('/');
            let mut answer = String::from("<DeleteResult>");
            for part in text.split("<Key>").skip(1) {
                let key = part.split("</Key>").next().unwrap();
                objects.remove(&format!("{bucket}/{key}"));
                answer.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
            }
            Answer::new(200, answer + "</DeleteResult>")
        }
        "DELETE" if asks("uploadId") => {
            state.uploads.lock().unwrap().remove(&request.query["uploadId"]);
            Answer::new(204, "")
        }
        "DELETE" => {
            objects.remove(&request.key);
            Answer::new(204, "")
        }
        _ => Answer::error(405, "MethodNotAllowed"),
    }
}

fn get(body: Arc<Vec<u8>>, request: &Request, fault: Option<Fault>) -> Answer {
    let size = body.len();
    let answer = Answer { status: 200, headers: vec![], range: 0..size, body }
        .with("ETag", "\"x\"")
        .with("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT");
    let Some(range) = request.headers.get("range").filter(|_| fault != Some(Fault::NoRanges))
    else {
        return answer;
    };
    let parsed = range.strip_prefix("bytes=").and_then(|range| {
        let (from, to) = range.split_once('-')?;
        Some((from.parse::<usize>().ok()?, to.parse::<usize>().map_or(size, |to| to + 1)))
    });
    let Some((from, to)) = parsed.filter(|(from, _)| *from < size) else {
        return Answer::error(416, "InvalidRange");
    };
    let (shift, more) = match fault {
        Some(Fault::Shifted(by)) => (by as usize, 0),
        Some(Fault::WrongSize(by)) => (0, by as usize),
        _ => (0, 0),
    };
    let (from, to) = ((from + shift).min(size - 1), (to + shift).min(size));
    let shown = format!("bytes {from}-{}/{}", to - 1, size + more);
    Answer { status: 206, range: from..to, ..answer }.with("Content-Range", shown)
}

fn list(objects: &BTreeMap<String, Arc<Vec<u8>>>, request: &Request) -> Answer {
    let bucket = format!("{}/", request.key.trim_end_matches('/'));
    let given = |name: &str| request.query.get(name).cloned().unwrap_or_default();
    let (prefix, delimiter, after) =
        (given("prefix"), given("delimiter"), given("continuation-token"));
    let most: usize = given("max-keys").parse().unwrap_or(50);
    let (mut text, mut folders, mut count, mut last) =
        (String::new(), BTreeSet::new(), 0, String::new());
    let mut more = false;
    for (key, bytes) in objects.range(bucket.clone()..) {
        let Some(key) = key.strip_prefix(&bucket) else { break };
        let Some(rest) = key.strip_prefix(&prefix) else { continue };
        if key <= after.as_str() {
            continue;
        }
        if count == most {
            more = true;
            break;
        }
        last = key.to_owned();
        if let Some((folder, _)) = rest.split_once('/').filter(|_| !delimiter.is_empty()) {
            folders.insert(format!("{prefix}{folder}/"));
            continue;
        }
        count += 1;
        text.push_str(&format!(
            "<Contents><Key>{key}</Key><Size>{}</Size><ETag>\"x\"</ETag>\
             <LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>",
            bytes.len()
        ));
    }
    for folder in folders {
        text.push_str(&format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"));
    }
    if more {
        text.push_str(&format!("<NextContinuationToken>{last}</NextContinuationToken>"));
    }
    Answer::new(
        200,
        format!("<ListBucketResult><IsTruncated>{more}</IsTruncated>{text}</ListBucketResult>"),
    )
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or("/"));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let query = pairs.map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key), decoded(value))
    });
    let mut request = Request {
        method: method.to_owned(),
        key: decoded(path.trim_start_matches('/')),
        query: query.collect(),
        headers: HashMap::new(),
        body: vec![],
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        request.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let bytes = request.headers.get("content-length").and_then(|value| value.parse().ok());
    request.body.resize(bytes.unwrap_or(0), 0);
    reader.read_exact(&mut request.body)?;
    Ok(Some(request))
}

fn decoded(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        let hex = |byte: Option<u8>| char::from(byte.unwrap_or(b'0')).to_digit(16).unwrap_or(0);
        out.push(match byte {
            b'%' => (hex(bytes.next()) * 16 + hex(bytes.next())) as u8,
            byte => byte,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}
