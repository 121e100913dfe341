//! The page in a real, headless Chromium, driven by ChromeDriver, against a cluster of two workers.
//!
//! Where these are not installed (Debian: chromium, chromium-driver) the test says so and skips. With
//! `LITE_LLM_PICTURES=DIR` it leaves its screenshots there.

mod process;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use process::{Cluster, PATIENCE};
use serde_json::{Value, json};

/// The first paint of a visit comes within it, at least of the best of so many.
const FIRST_PAINT_MAX_MS: f64 = 1000.0;
/// See [`FIRST_PAINT_MAX_MS`].
const PAINTS: usize = 4;
/// How WebDriver names an element in its JSON.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A ChromeDriver and a browser that it drives; both end when it is dropped.
struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
    /// The browser's own folder.
    _profile: tempfile::TempDir,
}

/// An HTTP request, and the JSON that came back.
fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, String> {
    let mut stream = TcpStream::connect(address).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(2 * PATIENCE)).unwrap();
    let body = body.map_or_else(String::new, Value::to_string);
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).unwrap();
    // The driver keeps connections, whatever it is told.
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).map_err(|error| error.to_string())?;
        match line.trim_end().to_ascii_lowercase().split_once(':') {
            Some(("content-length", value)) => length = value.trim().parse().unwrap(),
            Some(_) => {}
            None if line.trim_end().is_empty() => break,
            None => {}
        }
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
    let body = std::str::from_utf8(&bytes).unwrap();
    let value: Value = serde_json::from_str(body).map_err(|error| format!("{error}: {body}"))?;
    match value["value"]["error"].as_str() {
        Some(error) => Err(format!("{method} {path}: {error}: {}", value["value"]["message"])),
        None => Ok(value["value"].clone()),
    }
}

impl Browser {
    /// Starts both; nothing where they are not installed.
    fn start() -> Option<Self> {
        let chromium = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
        let chromium = chromium.into_iter().find(|path| PathBuf::from(path).exists());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let (Some(chromium), Ok(driver)) = (chromium, driver) else {
            println!("skipped: chromium and chromedriver are not installed");
            return None;
        };
        let address: SocketAddr = ([127, 0, 0, 1], port).into();
        let profile = tempfile::tempdir().unwrap();
        let mut browser = Self { driver, address, session: String::new(), _profile: profile };
        let folder = format!("--user-data-dir={}", browser._profile.path().display());
        let flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            &folder,
        ];
        let options = json!({ "binary": chromium, "args": flags });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let begun = Instant::now();
        let made = loop {
            match ask(address, "POST", "/session", Some(&wanted)) {
                Ok(made) => break made,
                // The driver itself may still be starting.
                Err(error) if begun.elapsed() < PATIENCE && error.contains("refused") => {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(error) => panic!("{error}"),
            }
        };
        browser.session = made["sessionId"].as_str().unwrap().to_owned();
        Some(browser)
    }

    #[track_caller]
    fn post(&self, what: &str, body: Value) -> Value {
        let path = format!("/session/{}/{what}", self.session);
        ask(self.address, "POST", &path, Some(&body)).unwrap()
    }

    #[track_caller]
    fn run(&self, script: &str) -> Value {
        self.post("execute/sync", json!({ "script": script, "args": [] }))
    }

    /// Waits until a script returns something that is true.
    #[track_caller]
    fn until(&self, what: &str, script: &str) {
        let begun = Instant::now();
        while self.run(script) != json!(true) {
            let text = self.run("return document.body.innerText");
            assert!(begun.elapsed() < PATIENCE, "{what} never came: {text}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn devtools(&self, command: &str, parameters: Value) {
        self.post("goog/cdp/execute", json!({ "cmd": command, "params": parameters }));
    }

    /// A window of this size, in light or dark.
    fn looks(&self, (width, height): (u32, u32), phone: bool, scheme: &str) {
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone }),
        );
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": [feature] }));
    }

    #[track_caller]
    fn click(&self, selector: &str) {
        let by = json!({ "using": "css selector", "value": selector });
        let element = self.post("element", by)[ELEMENT].as_str().unwrap().to_owned();
        self.post(&format!("element/{element}/click"), json!({}));
    }

    /// Presses keys where the focus is.
    fn keys(&self, keys: &[&str]) {
        let press = |key: &&str| {
            [json!({ "type": "keyDown", "value": key }), json!({ "type": "keyUp", "value": key })]
        };
        let actions: Vec<Value> = keys.iter().flat_map(press).collect();
        let keyboard = json!({ "type": "key", "id": "keyboard", "actions": actions });
        self.post("actions", json!({ "actions": [keyboard] }));
    }

    /// Leaves a screenshot, if that is wanted.
    fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("LITE_LLM_PICTURES") else { return };
        let path = format!("/session/{}/screenshot", self.session);
        let taken = ask(self.address, "GET", &path, None).unwrap();
        let file = PathBuf::from(folder).join(format!("{name}.png"));
        fs::write(file, base64(taken.as_str().unwrap())).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser, too.
        let _ = ask(self.address, "DELETE", &format!("/session/{}", self.session), None);
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u8> = text.bytes().filter_map(digit).collect();
    let whole = |four: &[u8]| {
        let bits = four.iter().fold(0u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - four.len()));
        bits.to_be_bytes()[1..four.len()].to_vec()
    };
    digits.chunks(4).flat_map(whole).collect()
}

#[test]
fn the_page_shows_the_cluster_and_plays() {
    let Some(browser) = Browser::start() else { return };
    let mut cluster =
        Cluster::ready_with(&["a", "b"], &[], &["--http", "127.0.0.1:0", "--http-model", "demo"]);
    cluster.coordinator.says("http on ");
    let said = cluster.coordinator.out();
    let line = said.lines().find(|line| line.starts_with("http on ")).unwrap();
    let url = line.split([' ', ',']).nth(2).unwrap().trim_end_matches("/v1");

    browser.looks((1280, 800), false, "light");
    // A browser that has just started is slow at first; other tests may be taking the processor.
    let painted = "const paint = performance.getEntriesByName('first-contentful-paint')[0]; \
                   return paint ? paint.startTime : null";
    let mut paints = Vec::new();
    for _ in 0..PAINTS {
        browser.post("url", json!({ "url": url }));
        let begun = Instant::now();
        paints.push(loop {
            match browser.run(painted).as_f64() {
                Some(paint) => break paint,
                None => assert!(begun.elapsed() < PATIENCE, "nothing was ever painted"),
            }
            thread::sleep(Duration::from_millis(20));
        });
    }
    println!("first contentful paint after {paints:.0?} ms");
    let best = paints.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(best < FIRST_PAINT_MAX_MS, "{paints:?} ms");

    // What the nodes hold, and where all experts are.
    let text =
        |id: &str| browser.run(&format!("return document.getElementById('{id}').textContent"));
    browser.until("the state", "return document.getElementById('state').textContent === 'ready'");
    browser.until("two nodes", "return document.querySelectorAll('#nodes > li').length === 2");
    browser.until(
        "filling residences",
        "return document.querySelectorAll('#nodes progress').length >= 2",
    );
    browser.until("a heat map", "return document.getElementById('map').width > 1");
    browser.until("links", "return document.querySelectorAll('#links tr').length === 2");

    // The playground: tokens, and the experts of each.
    browser.run("document.getElementById('max').value = 24; document.getElementById('ask').scrollIntoView()");
    browser.click("#go");
    browser.until(
        "the end of the answer",
        "return document.getElementById('cost').textContent.includes('24 tokens in')",
    );
    assert_eq!(browser.run("return document.querySelectorAll('#answer .token').length"), json!(24));
    let cost = text("cost").to_string();
    assert!(cost.contains("tier_1b") && cost.contains("of weights a token"), "{cost}");
    // By the keyboard alone, from the first token on.
    browser.run("document.querySelector('#answer .token').focus()");
    browser.keys(&["\u{E014}", "\u{E014}"]);
    browser.until("details", "return !document.getElementById('detail').hidden");
    let detail = text("detail").to_string();
    assert!(detail.starts_with("\"Token 3"), "{detail}");
    for words in ["held: ", " on a", " on b", "layer ", "probability", " ms "] {
        assert!(detail.contains(words), "{words:?} is missing: {detail}");
    }
    // What it computed is on the map, which the keyboard reads, too.
    let loaded = "return experts.loads.reduce((a, b) => a + b, 0) > 0";
    browser.until("loads", loaded);
    browser.until("messages", "return [...document.querySelectorAll('#links td:last-child')].some(cell => +cell.textContent > 0)");
    browser.run("document.getElementById('map').focus()");
    browser.keys(&["\u{E014}", "\u{E014}", "\u{E015}"]);
    let cell = text("cell").to_string();
    assert!(cell.contains("layer ") && cell.contains("expert 1: "), "{cell}");

    // Everything that can be used has a name; nothing is wider than the window.
    let nameless = "return [...document.querySelectorAll('input, textarea, button, canvas, progress, [tabindex]')].filter(one => \
         one.tabIndex >= 0 && !(one.labels && one.labels.length) && !one.textContent.trim() && \
         !one.ariaLabel && !one.getAttribute('aria-labelledby')).map(one => one.outerHTML)";
    assert_eq!(browser.run(nameless), json!([]));
    let wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth";
    browser.run("scrollTo(0, 0); document.activeElement.blur()");
    for (size, name) in [((1280, 800), "desktop"), ((390, 844), "phone")] {
        for scheme in ["light", "dark"] {
            browser.looks(size, name == "phone", scheme);
            thread::sleep(Duration::from_millis(300));
            assert_eq!(browser.run(wide), json!(false), "{name}, {scheme}: wider than the window");
            browser.picture(&format!("page-{name}-{scheme}"));
        }
        browser.run("document.getElementById('map-title').scrollIntoView()");
        browser.picture(&format!("page-{name}-experts"));
        browser.click("#by input[value=home]");
        browser.run("document.getElementById('try').scrollIntoView()");
        browser.picture(&format!("page-{name}-playground"));
        browser.run("scrollTo(0, 0)");
    }

    let path = format!("/session/{}/se/log", browser.session);
    let logged = ask(browser.address, "POST", &path, Some(&json!({ "type": "browser" }))).unwrap();
    let bad = |entry: &&Value| ["SEVERE", "WARNING"].contains(&entry["level"].as_str().unwrap());
    let bad: Vec<&Value> = logged.as_array().unwrap().iter().filter(bad).collect();
    assert!(bad.is_empty(), "the console says {bad:?}");
}
