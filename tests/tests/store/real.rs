//! The same against an S3 server that others wrote: moto, where it is installed
//! (`pip install "moto[s3,server]"`; `MOTO_SERVER` names the program if it is not on the path).

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use lite_llm_actors::archive::{StoreArchive, StoreOptions, open_checkpoint_url};
use lite_llm_runtime::{checkpoint::verify::verify, import::Destination};
use lite_llm_tests::demo;

use super::{bring, compression, limits, outcome};

/// How long the server may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running server with an empty bucket; it ends with this.
struct Moto {
    process: Child,
    address: SocketAddr,
}

impl Moto {
    /// `None`, and a line that says so, where there is none.
    fn start() -> Option<Self> {
        let program = std::env::var_os("MOTO_SERVER").unwrap_or("moto_server".into());
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let started = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &free.port().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = started else {
            println!("skipped: {} is not here", program.display());
            return None;
        };
        let moto = Self { process, address: free };
        let begun = Instant::now();
        loop {
            match moto.make_bucket() {
                Ok(200) => return Some(moto),
                other => assert!(begun.elapsed() < START_TIMEOUT, "moto does not start: {other:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn make_bucket(&self) -> std::io::Result<u16> {
        let mut stream = TcpStream::connect(self.address)?;
        let head = "PUT /bucket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n";
        stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        reader.read_to_end(&mut Vec::new())?;
        Ok(line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0))
    }

    fn options(&self) -> StoreOptions {
        let environment = [
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ACCESS_KEY_ID", "TESTKEY".into()),
            ("AWS_SECRET_ACCESS_KEY", "hunter2".into()),
            ("AWS_REGION", "us-east-1".into()),
        ];
        let environment = environment.map(|(key, value)| (key.to_owned(), value)).into();
        StoreOptions { environment, limits: limits() }
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // A process that has ended already needs no end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_checkpoint_goes_to_a_real_s3_server_and_comes_back() {
    let Some(moto) = Moto::start() else { return };
    let options = moto.options();
    let expected = outcome(&demo(), 1).await;
    for (url, compress) in [("s3://bucket/plain", None), ("s3://bucket/a/b", compression())] {
        let out = || Destination::Store(Arc::new(StoreArchive::open(url, &options).unwrap()));
        let id = bring(out(), compress).id();
        assert_eq!(id == demo().id(), compress.is_none());
        let checkpoint = Arc::new(open_checkpoint_url(url, &options).unwrap());
        assert_eq!(checkpoint.id(), id);
        verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        assert!(outcome(&checkpoint, 1).await == expected, "{url}");
        assert!(outcome(&checkpoint, 3).await == expected, "{url}, three workers");
        let error = lite_llm_runtime::import::import(
            &lite_llm_runtime::import::ImportOptions::new(super::demo_folder(), out()),
            &mut |_, _, _| {},
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains("already holds a checkpoint"), "{error}");
    }
}
