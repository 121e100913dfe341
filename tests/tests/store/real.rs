//! The same against an S3 server that others wrote, moto's, which checks every signature.
//!
//! It runs where moto is: `LITE_LLM_MOTO` names a Python that has it (`.ci/long` makes one).

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use lite_llm_actors::archive::{StoreArchive, StoreOptions, open_checkpoint_url};
use lite_llm_runtime::{
    checkpoint::{archive::Archive, inspect::inspect, verify::verify},
    import::{Destination, ImportOptions, import},
};
use lite_llm_tests::demo;

use super::{compression, demo_folder, limits, outcome};

/// Where a Python with moto is looked for.
const PLACE: &str = "/tmp/moto/bin/python";

struct Moto {
    process: Child,
    /// URL, access key, secret.
    says: [String; 3],
}

impl Moto {
    fn start() -> Option<Self> {
        let named = std::env::var_os("LITE_LLM_MOTO").map(PathBuf::from);
        let python = named.clone().unwrap_or_else(|| PLACE.into());
        if named.is_none() && !python.exists() {
            println!("skipped: no moto at {PLACE}, and LITE_LLM_MOTO names no Python that has it");
            return None;
        }
        let mut process = Command::new(&python)
            .args(["-B", "-c", include_str!("moto.py")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", python.display()));
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let says: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let says = says.try_into().expect("moto starts and says where; run moto.py to see why not");
        Some(Self { process, says })
    }

    fn options(&self, secret: &str) -> StoreOptions {
        let [url, key, _] = &self.says;
        let environment = [
            ("AWS_ENDPOINT_URL", &**url),
            ("AWS_ACCESS_KEY_ID", key),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_REGION", "us-east-1"),
        ];
        let environment = environment.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        StoreOptions { environment, limits: limits() }
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It ends with its standard input.
        self.process.stdin.take();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_checkpoint_goes_to_a_real_server_and_comes_back() {
    let Some(moto) = Moto::start() else { return };
    let options = moto.options(&moto.says[2]);
    let store = |url: &str| Arc::new(StoreArchive::open(url, &options).unwrap());
    for (url, compress) in [("s3://models/a/demo", None), ("s3://models/packed", compression())] {
        let out = Destination::Store(store(url));
        let wanted = ImportOptions { compress, ..ImportOptions::new(demo_folder(), out) };
        let summary = import(&wanted, &mut |_, _, _| {}).unwrap();
        let again = import(&wanted, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(again.contains("already holds a checkpoint"), "{again}");
        let names = store(url).list("").unwrap().unwrap();
        let names: Vec<_> = names.iter().map(|(name, _)| &**name).collect();
        assert!(names.contains(&"tiers/") && names.contains(&"manifest.1.json"), "{names:?}");
        assert!(names.iter().all(|name| !name.contains("import")), "{names:?}");

        let checkpoint = Arc::new(open_checkpoint_url(url, &options).unwrap());
        assert_eq!(inspect(&checkpoint).unwrap(), summary);
        assert_eq!(compress.is_none(), summary.id == demo().manifest().root.to_string());
        let report = verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        assert_eq!(report.sections, verify(&demo(), &mut |_, _, _| {}).unwrap().sections);
        for key in checkpoint.config().expert_keys().step_by(7) {
            let (there, here) = (checkpoint.expert(key).unwrap(), demo().expert(key).unwrap());
            assert!(there.gate.data()[..] == here.gate.data()[..], "{key}");
            assert!(there.down.data()[..] == here.down.data()[..], "{key}");
        }
        assert!(outcome(&checkpoint, 3).await == outcome(&demo(), 1).await, "{url}");
    }

    // An object in parts, one that was begun and is given up, and reads beyond its end.
    let archive = store("s3://models/large");
    let bytes: Vec<u8> = (0..40u32 << 20).map(|i| (i ^ (i >> 9)) as u8).collect();
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    let begun = archive.begin_put("object", bytes.len() as u64).unwrap();
    archive.abandon_put("object", begun.as_deref().unwrap()).unwrap();
    archive.abandon_put("object", begun.as_deref().unwrap()).unwrap();
    archive.put("object", &file, bytes.len() as u64, None).unwrap();
    let mut out = vec![0; bytes.len()];
    assert_eq!(archive.read_into("object", 0, &mut out), Ok(40 << 20));
    assert!(out == bytes);
    assert_eq!(archive.read_into("object", 1 << 30, &mut out[..10]), Ok(40 << 20));
    assert_eq!(archive.size("nothing"), Ok(None));
    assert_eq!(archive.create("mark", b"x"), Ok(true));
    assert_eq!(archive.create("mark", b"x"), Ok(false));
    archive.remove(&["mark".into(), "nothing".into()]).unwrap();
    assert_eq!(archive.size("mark"), Ok(None));

    // Who signs with another secret is refused, and it is not repeated.
    let error = open_checkpoint_url("s3://models/a/demo", &moto.options("hunter2")).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("access denied (403 SignatureDoesNotMatch)"), "{error}");
    assert!(!error.contains("hunter2") && !error.contains(&moto.says[1]), "{error}");
}
