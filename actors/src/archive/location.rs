//! URLs of checkpoints, and the stores behind them.
//!
//! Credentials come from the environment, under the names that each cloud's tools read, and never
//! from a URL: URLs are shown, logged and sent to workers.

use std::{path::Path as FsPath, sync::Arc};

use lite_llm_runtime::checkpoint::archive::{ArchiveError, ArchiveFailure};
use object_store::{
    ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    http::HttpBuilder,
    local::LocalFileSystem,
    multipart::MultipartStore,
    path::Path,
};
use url::Url;

use super::Limits;

/// Kinds of stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    S3,
    Gcs,
    Azure,
    Http,
    File,
}

impl Kind {
    fn of(scheme: &str) -> Option<Self> {
        Some(match scheme {
            "s3" | "s3a" => Self::S3,
            "gs" => Self::Gcs,
            "az" | "abfs" | "abfss" => Self::Azure,
            "http" | "https" => Self::Http,
            "file" => Self::File,
            _ => return None,
        })
    }

    /// What to do when the store refuses.
    pub(super) fn about_access(self) -> &'static str {
        match self {
            Self::S3 => {
                "the credentials in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN \
                 must be allowed to do this in AWS_REGION; AWS_SKIP_SIGNATURE=true reads public \
                 buckets"
            }
            Self::Gcs => {
                "the account in GOOGLE_APPLICATION_CREDENTIALS must be allowed to do this; \
                 GOOGLE_SKIP_SIGNATURE=true reads public buckets"
            }
            Self::Azure => {
                "the credentials in AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or a \
                 token, or a service principal) must be allowed to do this"
            }
            Self::Http => "plain web servers are read without credentials",
            Self::File => "the file's permissions forbid it",
        }
    }

    /// What to do when there are no credentials.
    pub(super) fn about_credentials(self) -> &'static str {
        match self {
            Self::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a \
                 public bucket"
            }
            Self::Gcs => {
                "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public \
                 bucket"
            }
            Self::Azure => "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
            Self::Http | Self::File => "none are needed here",
        }
    }

    /// What to do when somebody else is there.
    pub(super) fn about_redirects(self) -> &'static str {
        match self {
            Self::S3 => {
                "AWS_REGION must name the bucket's own region, and AWS_ENDPOINT_URL, if set, too"
            }
            _ => self.about_address(),
        }
    }

    /// What to do when nobody is there.
    pub(super) fn about_address(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ENDPOINT_URL and AWS_REGION say where it is",
            Self::Gcs => "the bucket's name is the first part of the URL",
            Self::Azure => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_ENDPOINT say where it is",
            Self::Http => "the URL says where it is",
            Self::File => "the URL is file:// and an absolute path",
        }
    }
}

/// Whether a location is a URL, not a path: whatever has a scheme, for it is not to be repeated as a
/// path where it holds credentials.
pub fn is_url(location: &FsPath) -> bool {
    let scheme = location.to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    })
}

/// A URL and the number of the manifest that it asks for: `URL@N`.
pub(super) fn split_number(text: &str) -> (&str, Option<u64>) {
    match text.rsplit_once('@') {
        Some((url, number)) if !number.contains('/') => match number.parse() {
            Ok(number) => (url, Some(number)),
            Err(_) => (text, None),
        },
        _ => (text, None),
    }
}

/// A store and the prefix of the checkpoint in it.
pub(super) struct Opened {
    pub(super) kind: Kind,
    /// The URL as it may be shown.
    pub(super) location: String,
    pub(super) prefix: Path,
    pub(super) store: Arc<dyn ObjectStore>,
    /// How objects are written in parts.
    pub(super) multipart: Option<Arc<dyn MultipartStore>>,
}

/// Opens the store of a URL. Asks nobody yet.
pub(super) fn open(
    text: &str,
    environment: &[(String, String)],
    limits: &Limits,
) -> Result<Opened, ArchiveError> {
    // Where something secret may stand in it, the URL itself is not repeated.
    let refused = |object: &str, reason: &str| ArchiveError {
        object: object.to_owned(),
        kind: ArchiveFailure::Unsupported,
        reason: reason.to_owned(),
    };
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let scheme = scheme.to_ascii_lowercase();
    let text = &*format!("{scheme}://{rest}");
    let Some(kind) = Kind::of(&scheme) else {
        let reason = "no such kind of store; s3, gs, az, http, https and file are known";
        return Err(refused(&format!("{scheme}://…"), reason));
    };
    let shown = format!("{scheme}://…");
    let url = Url::parse(text).map_err(|error| refused(&shown, &error.to_string()))?;
    // An Azure URL names its container there.
    if url.password().is_some() || (kind != Kind::Azure && !url.username().is_empty()) {
        let reason = "a URL with a user in it; credentials come from the environment only";
        return Err(refused(&shown, reason));
    }
    if url.query().is_some() || url.fragment().is_some() {
        let reason = "a URL with ? or # in it; a signature there would fit one object only: name \
                      the checkpoint's prefix, and give credentials in the environment";
        return Err(refused(&shown, reason));
    }
    if kind != Kind::File && url.host_str().is_none_or(str::is_empty) {
        let reason =
            "a URL without a bucket, container or host; SCHEME://BUCKET/PREFIX is expected";
        return Err(refused(&shown, reason));
    }
    let location = text.trim_end_matches('/').to_owned();
    if split_number(&location).1.is_some() {
        let reason = "the URL of one manifest, which is read and never written; name the checkpoint's \
                      prefix, without @ and a number";
        return Err(refused(&location, reason));
    }
    let bad_path = |_| refused(&location, "a path with empty, . or .. parts");
    let prefix = Path::from_url_path(url.path()).map_err(bad_path)?;
    // What is wrong here is what the environment says; its values are not repeated.
    let bad_options =
        |_| refused(&location, "the environment's settings for this store do not fit together");
    let base = &url[..url::Position::BeforePath];
    let connect = format!("{}ms", limits.idle.as_millis());
    let http = |name: &str| {
        let starts =
            |(key, value): &(String, String)| key.starts_with(name) && value.starts_with("http://");
        environment.iter().any(starts)
    };
    // Idle connections and the overall time have limits of our own.
    let options = |plain: bool| {
        [
            (ClientConfigKey::Timeout, "1day".to_owned()),
            (ClientConfigKey::ConnectTimeout, connect.clone()),
            (ClientConfigKey::AllowHttp, plain.to_string()),
        ]
    };
    let (store, multipart): (Arc<dyn ObjectStore>, Option<Arc<dyn MultipartStore>>) = match kind {
        Kind::S3 => {
            let mut builder = AmazonS3Builder::new().with_url(text).with_retry(no_retries());
            for (key, value) in options(http("AWS_ENDPOINT")) {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            for (key, value) in environment.iter().filter(|(key, _)| key.starts_with("AWS_")) {
                if let Ok(key) = key.to_ascii_lowercase().parse() {
                    builder = builder.with_config(key, value);
                }
            }
            let store = Arc::new(builder.build().map_err(bad_options)?);
            (store.clone(), Some(store))
        }
        Kind::Gcs => {
            let mut builder = GoogleCloudStorageBuilder::new().with_url(text);
            builder = builder.with_retry(no_retries());
            for (key, value) in options(http("GOOGLE_BASE_URL")) {
                builder = builder.with_config(GoogleConfigKey::Client(key), value);
            }
            for (key, value) in environment {
                let name = match key.as_str() {
                    "SERVICE_ACCOUNT" => "google_service_account",
                    key if key.starts_with("GOOGLE_") => key,
                    _ => continue,
                };
                if let Ok(key) = name.to_ascii_lowercase().parse() {
                    builder = builder.with_config(key, value);
                }
            }
            let store = Arc::new(builder.build().map_err(bad_options)?);
            (store.clone(), Some(store))
        }
        Kind::Azure => {
            let mut builder = MicrosoftAzureBuilder::new().with_url(text);
            builder = builder.with_retry(no_retries());
            for (key, value) in options(http("AZURE_")) {
                builder = builder.with_config(AzureConfigKey::Client(key), value);
            }
            for (key, value) in environment {
                let name = match key.as_str() {
                    "IDENTITY_ENDPOINT" => "azure_identity_endpoint",
                    key if key.starts_with("AZURE_") => key,
                    _ => continue,
                };
                if let Ok(key) = name.to_ascii_lowercase().parse() {
                    builder = builder.with_config(key, value);
                }
            }
            let store = Arc::new(builder.build().map_err(bad_options)?);
            (store.clone(), Some(store))
        }
        Kind::Http => {
            let mut builder = HttpBuilder::new().with_url(base).with_retry(no_retries());
            for (key, value) in options(scheme == "http") {
                builder = builder.with_config(key, value);
            }
            (Arc::new(builder.build().map_err(bad_options)?), None)
        }
        Kind::File => {
            if url.host_str().is_some_and(|host| !host.is_empty()) {
                let reason = "a file of another host; file:// and an absolute path is expected";
                return Err(refused(&location, reason));
            }
            (Arc::new(LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true)), None)
        }
    };
    Ok(Opened { kind, location, prefix, store, multipart })
}

/// One policy of retries is enough, and it is ours.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_from_paths_and_numbers_from_names() {
        for url in ["s3://b/x", "S3://b/x", "http://h:1/x", "file:///tmp/x", "x-1.y+z://h"] {
            assert!(is_url(url.as_ref()), "{url}");
        }
        for path in ["models/x", "/tmp/a://b", "x@1", "://x", "a b://c", "1x://c"] {
            assert!(!is_url(path.as_ref()), "{path}");
        }
        assert_eq!(split_number("s3://b/x@3"), ("s3://b/x", Some(3)));
        assert_eq!(split_number("s3://b/x"), ("s3://b/x", None));
        let azure = "abfss://box@account.dfs.core.windows.net/x";
        assert_eq!(split_number(azure), (azure, None));
        assert_eq!(split_number(&format!("{azure}@1")), (azure, Some(1)));
    }

    #[test]
    fn secrets_in_urls_are_refused_and_not_repeated() {
        for url in [
            "https://user:hunter2@host/x",
            "https://hunter2@host/x",
            "https://host/x?X-Amz-Signature=hunter2",
            "https://host/x#hunter2",
            "s3://hunter2@bucket/x",
            "S3://key:hunter2@bucket/x",
            "svn+ssh://key:hunter2@bucket/x",
            "hunter2",
        ] {
            let error = open(url, &[], &Limits::default()).err().expect(url).to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn every_kind_of_store_opens_with_the_settings_of_its_tools() {
        let environment: Vec<(String, String)> = [
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
            ("AWS_REGION", "eu-north-1"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "Zm9v"),
            ("GOOGLE_SKIP_SIGNATURE", "true"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        for (url, prefix) in [
            ("s3://bucket/some/model/", "some/model"),
            ("s3://bucket", ""),
            ("gs://bucket/model", "model"),
            ("az://container/model", "model"),
            ("http://127.0.0.1:1/a%20b", "a b"),
            ("https://host/model", "model"),
            ("file:///tmp/model", "tmp/model"),
        ] {
            let opened = open(url, &environment, &Limits::default());
            let opened = opened.unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(
                (opened.prefix.as_ref(), &*opened.location),
                (prefix, url.trim_end_matches('/'))
            );
        }
        let opened = open("S3://Bucket/Model", &environment, &Limits::default()).unwrap();
        assert_eq!((opened.prefix.as_ref(), &*opened.location), ("Model", "s3://Bucket/Model"));
        for url in ["ftp://host/x", "file://host/x", "file:///a/x@3", "s3://bucket/x@3/"] {
            assert!(open(url, &environment, &Limits::default()).is_err(), "{url}");
        }
        for url in ["s3://", "s3:///model", "gs://", "az:///x"] {
            let error = open(url, &environment, &Limits::default()).err().expect(url).to_string();
            assert!(error.contains("without a bucket"), "{url}: {error}");
        }
    }
}
