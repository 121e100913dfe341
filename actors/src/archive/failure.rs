//! What can go wrong between us and a store, whether trying again may help, and what to say of it.
//!
//! Invariant: nothing that a store or a library said is repeated, but for a status and an error code
//! of plain letters: messages of stores hold signed URLs and names of keys.

use std::{error::Error, fmt, time::Duration};

use lite_llm_runtime::checkpoint::archive::{ArchiveError, ArchiveFailure};
use object_store::client::{HttpError, HttpErrorKind};

use super::location::Kind;

/// Longest error code that is repeated, such as `SignatureDoesNotMatch`.
const CODE_BYTES_MAX: usize = 40;

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// There is no such object.
    Absent,
    /// There is one already.
    Exists,
    /// An answer that is none, and the store's own name for the reason.
    Status(u16, Option<String>),
    /// Nobody listens there, or there is no such host.
    Unreachable,
    /// The connection broke before or within an answer.
    Dropped,
    /// Nothing was heard for so long.
    Silent(Duration),
    /// An answer ended early.
    Short {
        /// Bytes that came.
        found: u64,
        /// Bytes that were asked for.
        expected: u64,
    },
    /// An answer with other bytes than were asked for.
    WrongRange,
    /// The server sends whole files only.
    NoRanges,
    /// There is nobody to ask for credentials.
    NoCredentials,
    /// The store has no such operation.
    Unsupported,
    /// A link that leads out of the checkpoint.
    Outside,
    /// The file system refused.
    Disk(std::io::ErrorKind),
    /// Time is up, while an answer was on its way.
    Late,
    /// Anything else.
    Strange,
}

impl Failure {
    /// Whether the next attempt may go better.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Status(status, _) => matches!(status, 408 | 409 | 425 | 429 | 500..=599),
            Self::Unreachable
            | Self::Dropped
            | Self::Silent(_)
            | Self::Short { .. }
            | Self::WrongRange => true,
            _ => false,
        }
    }

    fn kind(&self) -> ArchiveFailure {
        match self {
            Self::Absent => ArchiveFailure::Absent,
            Self::Status(401 | 403, _) | Self::NoCredentials => ArchiveFailure::Denied,
            Self::NoRanges | Self::Unsupported | Self::Outside | Self::Exists => {
                ArchiveFailure::Unsupported
            }
            _ => ArchiveFailure::Unavailable,
        }
    }

    /// The error of an operation that failed for good, after some tries.
    pub(super) fn error(
        &self,
        kind: Kind,
        object: String,
        tries: u32,
        elapsed: Duration,
    ) -> ArchiveError {
        let mut reason = self.to_string();
        let what_to_do = match self {
            Self::Absent => Some(
                "the checkpoint is incomplete, or the URL is not its own: look at it, or import it again",
            ),
            Self::Status(401 | 403, _) => Some(kind.about_access()),
            Self::NoCredentials => Some(kind.about_credentials()),
            Self::NoRanges => Some("use a server that answers range requests, as nginx does"),
            Self::Unreachable => Some(kind.about_address()),
            Self::Status(301 | 307 | 308, _) => Some(kind.about_redirects()),
            Self::Status(400, _) => Some(kind.about_address()),
            _ => None,
        };
        if self.may_pass() || *self == Self::Late {
            let (seconds, plural) =
                (elapsed.as_secs_f64(), if tries == 1 { "try" } else { "tries" });
            reason.push_str(&format!("; gave up after {tries} {plural} in {seconds:.1} s"));
            if what_to_do.is_none() {
                reason.push_str(", try again later");
            }
        }
        if let Some(what_to_do) = what_to_do {
            reason.push_str("; ");
            reason.push_str(what_to_do);
        }
        ArchiveError { object, kind: self.kind(), reason }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("not there (404)"),
            Self::Exists => f.write_str("it exists already"),
            Self::Status(status, code) => {
                let meaning = match status {
                    401 => "not authenticated",
                    403 => "access denied",
                    301 | 307 | 308 => "the server sends us elsewhere",
                    409 => "another request for it was in the way",
                    408 | 504 => "the server timed out",
                    429 | 503 => "the server is overloaded",
                    500..=599 => "the server failed",
                    _ => "the server refused",
                };
                write!(f, "{meaning} ({status}")?;
                code.iter().try_for_each(|code| write!(f, " {code}"))?;
                f.write_str(")")
            }
            Self::Unreachable => f.write_str("the server cannot be reached"),
            Self::Dropped => f.write_str("the server dropped the connection"),
            Self::Silent(idle) => {
                write!(f, "the server sent nothing for {:.1} s", idle.as_secs_f64())
            }
            Self::Short { found, expected } => {
                write!(f, "the answer ended after {found} of {expected} bytes")
            }
            Self::WrongRange => {
                f.write_str("the server answered with other bytes than were asked for")
            }
            Self::NoRanges => f.write_str("the server sends whole files only, not ranges of them"),
            Self::NoCredentials => f.write_str("there are no credentials"),
            Self::Unsupported => f.write_str("this kind of store cannot do that"),
            Self::Outside => f.write_str("it is a link that leads out of the checkpoint"),
            Self::Disk(kind) => write!(f, "the file system says: {kind}"),
            Self::Late => f.write_str("the server is too slow"),
            Self::Strange => f.write_str("the server's answer makes no sense"),
        }
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error as E;
        // The store's types of errors are private but for these; the rest stands in their text,
        // which is read, not shown.
        let text = error.to_string();
        if text.contains("169.254.") || text.contains("metadata.google") {
            // The machine is no virtual machine of that cloud: nobody gives it credentials.
            return Self::NoCredentials;
        }
        let named = code(&text);
        match &error {
            // S3 asks to be asked again; what is there already, it and others name otherwise.
            E::AlreadyExists { .. } if named.as_deref().is_some_and(is_race) => {
                return Self::Status(409, named);
            }
            E::NotFound { .. } => return Self::Absent,
            E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => {
                return Self::Exists;
            }
            E::NotImplemented { .. } => return Self::Unsupported,
            E::PermissionDenied { .. } => return Self::Status(403, named),
            E::Unauthenticated { .. } => return Self::Status(401, named),
            _ => {}
        }
        let says = |words: &[&str]| words.iter().any(|words| text.contains(words));
        // S3 begins to answer that all is well before it has put the parts of an object together.
        if says(&["Server returned error response", "Got invalid multipart response"]) {
            return Self::Status(500, named);
        }
        if let Some(status) = status(&text) {
            return Self::Status(status, named);
        }
        // S3 does not say where a bucket of another region is.
        if says(&["Received redirect without LOCATION"]) {
            return Self::Status(301, None);
        }
        let mut source: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(error) = source {
            if let Some(http) = error.downcast_ref::<HttpError>() {
                return match http.kind() {
                    HttpErrorKind::Connect => Self::Unreachable,
                    HttpErrorKind::Timeout => Self::Unreachable,
                    _ => Self::Dropped,
                };
            }
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                return match io.kind() {
                    std::io::ErrorKind::NotFound => Self::Absent,
                    kind => Self::Disk(kind),
                };
            }
            source = error.source();
        }
        if says(&["non-partial response", "does not support range", "RangeNotSupported"]) {
            Self::NoRanges
        } else if says(&["Requested ", "Content-Range"]) {
            Self::WrongRange
        } else if matches!(error, E::NotSupported { .. }) {
            Self::NoRanges
        } else {
            Self::Strange
        }
    }
}

/// Codes of S3's answer 409 to a conditional write while another is under way.
fn is_race(code: &str) -> bool {
    matches!(code, "ConditionalRequestConflict" | "OperationAborted")
}

/// The status in an error's text.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The error code in a store's XML answer, if it is nothing but a word.
fn code(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = !code.is_empty() && code.bytes().all(|b| b.is_ascii_alphanumeric());
    (plain && code.len() <= CODE_BYTES_MAX).then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s3s_conflict_passes_and_azures_means_that_it_exists() {
        let conflict = |code: &str| {
            let text = format!("status code: 409 Conflict: <Error><Code>{code}</Code></Error>");
            let (path, source) = ("x".into(), text.into());
            Failure::from(object_store::Error::AlreadyExists { path, source })
        };
        assert!(conflict("ConditionalRequestConflict").may_pass());
        assert_eq!(conflict("BlobAlreadyExists"), Failure::Exists);
    }

    #[test]
    fn of_what_a_store_says_only_a_code_is_repeated() {
        let text = "status code: 403 Forbidden: <Error><Code>AccessDenied</Code><Message>key \
                    AKIAX of https://b/?X-Amz-Signature=f00</Message></Error>";
        let source = Box::<dyn Error + Send + Sync>::from(text);
        let failure = Failure::from(object_store::Error::Generic { store: "S3", source });
        assert_eq!(failure, Failure::Status(403, Some("AccessDenied".into())));
        let error = failure.error(Kind::S3, "s3://b/x".into(), 1, Duration::ZERO);
        assert!(!error.to_string().contains("AKIAX") && !error.to_string().contains("f00"));
        assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
        for odd in ["", "a b", "https://x", &"x".repeat(41)] {
            assert_eq!(code(&format!("<Code>{odd}</Code>")), None);
        }
    }
}
