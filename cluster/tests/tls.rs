//! The HTTP API over TLS: a certificate that signs itself, and clients that trust it or do not.

mod process;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
};

use process::{PATIENCE, Process, run};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, ServerName};

/// Writes a certificate for this machine and its key into a folder.
fn certificate(folder: &Path) -> (String, String, CertificateDer<'static>) {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    (text(&cert), text(&key), made.cert.der().clone())
}

/// Sends a request over TLS, and reads until the other side closes.
fn ask(
    address: SocketAddr,
    trusted: Option<&CertificateDer<'static>>,
    request: &str,
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    if let Some(certificate) = trusted {
        roots.add(certificate.clone()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = StreamOwned::new(connection, stream);
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    match stream.read_to_string(&mut text) {
        Ok(_) => Ok(text),
        // The server closes without a word of farewell.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(text),
        Err(error) => Err(error),
    }
}

#[test]
fn who_trusts_the_certificate_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, key, trusted) = certificate(folder.path());
    let flags = ["run", "--http", "127.0.0.1:0", "--http-cert", &cert, "--http-key", &key];
    let mut server = Process::start(&flags);
    server.says("http on https://");
    let said = server.out();
    let address = said.split("https://").nth(1).unwrap().split('/').next().unwrap();
    let address: SocketAddr = address.parse().unwrap();

    let head = "Host: localhost\r\nConnection: close\r\n";
    let health = format!("GET /health HTTP/1.1\r\n{head}\r\n");
    let reply = ask(address, Some(&trusted), &health).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("\"ok\""), "{reply}");
    let body = r#"{"prompt":"ls - list","max_tokens":5,"stream":true}"#;
    let post = format!(
        "POST /v1/completions HTTP/1.1\r\n{head}Content-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let reply = ask(address, Some(&trusted), &post).unwrap();
    assert!(reply.contains("data: [DONE]"), "{reply}");
    assert!(ask(address, None, &health).is_err(), "who does not trust it goes away");

    // What is spoken in plain gets no answer, and hurts nobody.
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    plain.write_all(health.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    let _ = plain.read_to_end(&mut bytes);
    assert!(!bytes.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&bytes));

    let url = format!("https://localhost:{}/health", address.port());
    let curl = |more: &[&str]| Command::new("curl").args(["-sS", "-m", "20"]).args(more).output();
    match curl(&["--cacert", &cert, &url]) {
        Ok(reply) => {
            assert!(reply.status.success(), "{reply:?}");
            assert_eq!(reply.stdout, br#"{"status":"ok"}"#);
            assert!(!curl(&[&url]).unwrap().status.success(), "curl trusts what it does not know");
        }
        Err(_) => println!("skipped: curl is not installed"),
    }
    server.signal("TERM");
    server.ends_within(PATIENCE).expect(0, &[]);
}

#[test]
fn files_that_are_no_certificate_or_key_are_named() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (cert, key, _) = certificate(folder.path());
    let (_, other, _) = certificate(other.path());
    let empty = folder.path().join("empty.pem");
    fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap();
    for (cert, key, words) in [
        (&*cert, &*other, &["--http-cert", "--http-key", "do not fit"][..]),
        ("none.pem", &key, &["--http-cert none.pem"]),
        (empty, &key, &["--http-cert", "empty.pem", "no certificate"]),
        (&cert, empty, &["--http-key", "empty.pem", "private key"]),
        (&cert, &cert, &["--http-key", "private key"]),
    ] {
        run(&["run", "--http", "127.0.0.1:0", "--http-cert", cert, "--http-key", key])
            .one_error(2, words);
    }
    run(&["run", "--http", "127.0.0.1:0", "--http-cert", &cert]).one_error(2, &["--http-key"]);
}
