//! Sizes in bytes as people write them: `3GiB`, `512MB`, `1073741824`; bytes per second: `1.2GB/s`; and
//! a share of a disk: `/fast/cache:100GiB`.

use std::{fmt, path::PathBuf, str::FromStr};

use lite_llm_runtime::residency::NvmeFolder;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

// A letter alone is a power of two, as docker, systemd and llama.cpp have it.
const UNITS: [(&str, u64); 12] = [
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size; 3GiB, 512MB or a number of bytes is expected");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim().to_ascii_lowercase());
        let factor = match unit.as_str() {
            "" | "b" => 1,
            unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1,
        };
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(factor).ok_or_else(wrong)?,
            Err(_) => {
                let number: f64 = number.parse().map_err(|_| wrong())?;
                (number * factor as f64) as u64
            }
        };
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.iter().find(|(unit, _)| self.0 >= *unit) {
            Some((unit, name)) => write!(f, "{:.1} {name}", self.0 as f64 / *unit as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

/// Bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = text.strip_suffix("/s").unwrap_or(text).parse::<Size>();
        match size {
            Ok(Size(bytes)) if bytes > 0 => Ok(Self(bytes)),
            _ => Err(format!("{text:?} is no rate; 1.2GB/s or 500MB/s is expected")),
        }
    }
}

/// Decimal, as vendors of disks and networks count.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1_000_000_000.. => write!(f, "{:.2} GB/s", self.0 as f64 / 1e9),
            _ => write!(f, "{:.1} MB/s", self.0 as f64 / 1e6),
        }
    }
}

/// A folder on a local disk, and how many bytes of it may be used: `DIR:SIZE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeArg {
    /// The folder.
    pub folder: PathBuf,
    /// Bytes that its files may have.
    pub budget: Size,
}

impl FromStr for NvmeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "a folder and a size are expected, such as /fast/cache:100GiB";
        // Folders may have colons, sizes have none.
        let parts = text.rsplit_once(':').filter(|(folder, _)| !folder.is_empty());
        let (folder, size) = parts.ok_or_else(|| format!("{text:?}: {expected}"))?;
        match size.parse::<Size>() {
            Ok(Size(0)) | Err(_) => Err(format!("{size:?} is no size of a cache; {expected}")),
            Ok(budget) => Ok(Self { folder: folder.into(), budget }),
        }
    }
}

impl From<NvmeArg> for NvmeFolder {
    fn from(NvmeArg { folder, budget }: NvmeArg) -> Self {
        Self { folder, budget: budget.0 }
    }
}

impl fmt::Display for NvmeArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.folder.display(), self.budget)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("12", 12),
            ("3GiB", 3 << 30),
            ("1.5 KiB", 1536),
            ("512mb", 512_000_000),
            ("140M", 140 << 20),
            ("3g", 3 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GiB", "3 parsecs", "-1", "99999999999TiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_short() {
        assert_eq!(Size(13_800_000_000).to_string(), "12.9 GiB");
        assert_eq!(Size(17).to_string(), "17 B");
    }

    #[test]
    fn rates_and_shares_of_disks_are_read_as_people_write_them() {
        for (text, bytes, shown) in [
            ("1.2GB/s", 1_200_000_000, "1.20 GB/s"),
            ("500MB/s", 500_000_000, "500.0 MB/s"),
            ("1GiB", 1 << 30, "1.07 GB/s"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate, rate.to_string().as_str()), (Rate(bytes), shown), "{text}");
        }
        for text in ["", "0", "/s", "5 MB/h", "fast"] {
            assert!(text.parse::<Rate>().unwrap_err().contains("1.2GB/s"), "{text}");
        }
        for (text, folder, budget) in
            [("/fast:3GiB", "/fast", 3 << 30), ("a:b:12", "a:b", 12), ("./x y:1kB", "./x y", 1000)]
        {
            let expected = NvmeArg { folder: folder.into(), budget: Size(budget) };
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "/fast", ":3GiB", "/fast:", "/fast:0", "/fast:much"] {
            assert!(text.parse::<NvmeArg>().unwrap_err().contains("/fast/cache:100GiB"), "{text}");
        }
    }
}
