//! What this machine has: cores and memory.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

/// Cores that this process may use.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that are free for new use, if the system says; the tightest of the machine's and
/// of every control group that this process is in.
pub(crate) fn free_memory() -> Option<u64> {
    let groups = control_groups().into_iter().filter_map(|group| free_in(&group));
    groups.chain(meminfo("MemAvailable:")).min()
}

/// The folders of this process's control groups that limit memory, the innermost first: of version 2
/// or of version 1.
fn control_groups() -> Vec<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = |prefix: &str, root: &str| -> Vec<PathBuf> {
        let own = own.lines().filter_map(|line| line.split_once(':').map(|(_, rest)| rest));
        let own = own.filter_map(|rest| rest.strip_prefix(prefix)).next().unwrap_or_default();
        // Where the group's folder is not to be seen, as in a container, the root is the group.
        Path::new(own).ancestors().map(|path| Path::new(root).join(path)).collect()
    };
    let second = groups(":/", "/sys/fs/cgroup");
    second.into_iter().chain(groups("memory:/", "/sys/fs/cgroup/memory")).collect()
}

/// Bytes that a control group's limit leaves; what it holds of files counts as free.
fn free_in(group: &Path) -> Option<u64> {
    let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes")).unwrap_or(0);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let line = |key: &str| stat.lines().find_map(|line| line.strip_prefix(key)?.parse().ok());
    let files = line("total_inactive_file ").or_else(|| line("inactive_file ")).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// Bytes of memory of the machine, if the system says.
pub(crate) fn total_memory() -> Option<u64> {
    meminfo("MemTotal:")
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
}
