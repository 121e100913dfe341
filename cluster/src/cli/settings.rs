//! Settings of coordinators and workers: defaults < `lite-llm.toml` < environment < flags.
//!
//! The file has a section per command whose keys are the command's flags, and may give `log`,
//! `log-format`, `otlp` and `trace-sample` before them; the environment has `LITE_LLM_COORDINATOR_…` and
//! `LITE_LLM_WORKER_…`. What they say is added to the words of the command line, unless these say it
//! already, so that one parser reads a value wherever it comes from. A key that is no flag is an error,
//! with the flag that is nearest.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgMatches, Command, CommandFactory, FromArgMatches, error::ErrorKind, parser::ValueSource,
};
use config::{Config, ConfigError, Map, Source, Value, ValueKind};

use super::Cli;

/// Commands that have settings.
const COMMANDS: [&str; 2] = ["coordinator", "worker"];
/// Flags of every command that a file may set, before its sections.
const GLOBAL: [&str; 4] = ["log", "log-format", "otlp", "trace-sample"];
/// Flags that are no settings.
const NOT_SETTINGS: [&str; 4] = ["help", "version", "config", "json"];
/// Where the file is looked for, unless told: the first that is there counts.
const FILES: [&str; 2] = ["lite-llm.toml", "/etc/lite-llm/lite-llm.toml"];
/// Longest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Before the names of commands and flags in the environment.
const PREFIX: &str = "LITE_LLM";
/// How alike two words must be for one to be taken for the other, of 1.
const ALIKE: f64 = 0.6;

/// A setting cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

/// One setting of a command, as it is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The flag, without its dashes.
    pub flag: String,
    /// Its value; nothing if it has none.
    pub value: Option<String>,
    /// Where the value comes from.
    pub origin: String,
}

/// What a file and the environment say.
#[derive(Debug)]
pub struct Settings {
    merged: Map<String, Value>,
    file: Option<PathBuf>,
}

/// The environment as a source: each variable under its command and flag.
#[derive(Debug, Clone)]
struct Variables(Vec<(String, String)>);

impl Source for Variables {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        let mut sections: Map<String, Value> = Map::new();
        for command in COMMANDS {
            let prefix = prefix(command);
            let of_command = self.0.iter().filter_map(|(name, value)| {
                let flag = name.strip_prefix(&prefix)?.to_lowercase().replace('_', "-");
                Some((flag, Value::new(Some(name), ValueKind::String(value.clone()))))
            });
            let table: Map<String, Value> = of_command.collect();
            if !table.is_empty() {
                sections.insert(command.to_owned(), Value::new(None, ValueKind::Table(table)));
            }
        }
        Ok(sections)
    }
}

/// Reads the command line, over what the file and the environment say. Prints help and mistakes, and
/// ends the process, as clap does.
pub fn parse() -> Result<Cli, SettingsError> {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    // Where the file is, and whether this command has settings, whatever else is wrong with the words.
    let first = Cli::command().ignore_errors(true).try_get_matches_from(&words);
    let first = first.unwrap_or_default();
    if let Some((name, given)) = first.subcommand()
        && COMMANDS.contains(&name)
    {
        let file = given.try_get_one::<PathBuf>("settings").ok().flatten();
        let settings = Settings::load(file.map(PathBuf::as_path))?;
        words.extend(settings.words(name, given)?);
    }
    let matches = Cli::command().get_matches_from(words);
    Cli::from_arg_matches(&matches).map_err(|error| error.exit())
}

impl Settings {
    /// Reads the file that is given, or the first that is found, and the environment.
    pub fn load(given: Option<&Path>) -> Result<Self, SettingsError> {
        let found = || FILES.iter().map(PathBuf::from).find(|path| path.is_file());
        let file = given.map(Path::to_owned).or_else(found);
        let text = file.as_deref().map(read).transpose()?;
        let text = file.as_deref().zip(text.as_deref());
        let mut variables = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            if COMMANDS.iter().any(|command| name.starts_with(&prefix(command))) {
                let value = value.into_string().map_err(|value| {
                    SettingsError(format!("{name}: {value:?} is no text in UTF-8"))
                })?;
                variables.push((name, value));
            }
        }
        Self::of(text, variables)
    }

    fn of(
        file: Option<(&Path, &str)>,
        variables: Vec<(String, String)>,
    ) -> Result<Self, SettingsError> {
        let mut builder = Config::builder();
        if let Some((path, text)) = file {
            // Read apart, so that values know their file.
            let parsed: Map<String, Value> = config::File::from_str(text, config::FileFormat::Toml)
                .collect()
                .map_err(|error| SettingsError(format!("{}: {error}", path.display())))?;
            builder = builder.add_source(OfFile(path.display().to_string(), parsed));
        }
        let built = builder.add_source(Variables(variables)).build();
        let merged = built.and_then(|built| built.collect());
        let merged = merged.map_err(|error| SettingsError(error.to_string()))?;
        let settings = Self { merged, file: file.map(|(path, _)| path.to_owned()) };
        settings.check_keys()?;
        Ok(settings)
    }

    /// The file that was read.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    fn check_keys(&self) -> Result<(), SettingsError> {
        let sections: Vec<&str> = COMMANDS.iter().chain(&GLOBAL).copied().collect();
        for (key, value) in &self.merged {
            check_key(key, value, "", &sections)?;
            if !COMMANDS.contains(&key.as_str()) {
                continue;
            }
            let ValueKind::Table(table) = &value.kind else {
                let from = origin(value);
                return Err(SettingsError(format!(
                    "{from}: {key} is a section, [{key}], and no value"
                )));
            };
            let command = Cli::command();
            let flags = flags(subcommand(&command, key));
            for (flag, value) in table {
                check_key(flag, value, &format!("{key}."), &flags)?;
            }
        }
        Ok(())
    }

    /// The values that a command's flags have unless they are given, and where each comes from.
    fn values(&self, command: &str) -> Result<Vec<(String, Vec<String>, String)>, SettingsError> {
        let of_command = match self.merged.get(command).map(|section| &section.kind) {
            Some(ValueKind::Table(table)) => Some(table),
            _ => None,
        };
        let global = self.merged.iter().filter(|(key, _)| GLOBAL.contains(&key.as_str()));
        let mut values = Vec::new();
        for (flag, value) in global.chain(of_command.into_iter().flatten()) {
            // A table that was merged has forgotten its own.
            let file = || {
                self.file.as_ref().map_or("the settings".into(), |file| file.display().to_string())
            };
            let from = value.origin().map_or_else(file, str::to_owned);
            let words = words(value).ok_or_else(|| {
                SettingsError(format!(
                    "{from}: {flag} is a text, a number, true, or a list of them"
                ))
            })?;
            values.push((flag.clone(), words, from));
        }
        values.sort();
        Ok(values)
    }

    /// What is to be added to the words of a command that were read as `given`. Each value is read as if
    /// it stood alone, so that mistakes name where they are.
    fn words(&self, name: &str, given: &ArgMatches) -> Result<Vec<OsString>, SettingsError> {
        let plain = optional(Cli::command(), name);
        let mut added = Vec::new();
        for (flag, values, from) in self.values(name)? {
            let words: Vec<String> =
                values.iter().map(|value| format!("--{flag}={value}")).collect();
            let alone = ["lite-llm", name].into_iter().chain(words.iter().map(String::as_str));
            if let Err(error) = plain.clone().try_get_matches_from(alone)
                && error.kind() != ErrorKind::MissingRequiredArgument
            {
                let said = error.to_string();
                let said = said.lines().next().unwrap_or_default();
                let said = said.strip_prefix("error: ").unwrap_or(said);
                return Err(SettingsError(format!("{from}: {flag}: {said}")));
            }
            if !is_given(&plain, name, given, &flag) {
                added.extend(words.into_iter().map(OsString::from));
            }
        }
        Ok(added)
    }

    /// All settings of a command, with these flags.
    pub fn in_force(&self, name: &str, words: &[String]) -> Result<Vec<Setting>, SettingsError> {
        let command = optional(Cli::command(), name);
        let read = |words: &[OsString]| {
            let all = ["lite-llm".into(), name.into()].into_iter().chain(words.iter().cloned());
            let matches = command.clone().get_matches_from(all);
            matches.subcommand().map(|(_, own)| own.clone()).unwrap_or_default()
        };
        let mut words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let given = read(&words);
        words.extend(self.words(name, &given)?);
        let own = read(&words);
        let values = self.values(name)?;
        let is_global = |argument: &&Arg| argument.get_long().is_some_and(|f| GLOBAL.contains(&f));
        let global = command.get_arguments().filter(is_global);
        let arguments = subcommand(&command, name).get_arguments().chain(global);
        // Whether it must be given is said by the command line itself.
        let plain = Cli::command();
        let required = |id: &str| {
            let mut arguments = subcommand(&plain, name).get_arguments();
            arguments.any(|argument| argument.get_id() == id && argument.is_required_set())
        };
        let mut settings: Vec<Setting> = arguments
            .filter_map(|argument| {
                let flag = argument.get_long()?.to_owned();
                if NOT_SETTINGS.contains(&flag.as_str()) {
                    return None;
                }
                let id = argument.get_id().as_str();
                let value = raw(&own, id);
                let set = || values.iter().find(|(key, ..)| *key == flag);
                let origin = match given.value_source(id) {
                    Some(ValueSource::CommandLine) => format!("--{flag}"),
                    Some(ValueSource::EnvVariable) => {
                        argument.get_env().map(|name| name.to_string_lossy().into_owned())?
                    }
                    _ => match (set(), &value) {
                        (Some((.., from)), _) => from.clone(),
                        (None, Some(_)) => "default".into(),
                        (None, None) if required(id) => "required, and not set".into(),
                        (None, None) => "not set".into(),
                    },
                };
                Some(Setting { flag, value, origin })
            })
            .collect();
        settings.sort_by(|a, b| a.flag.cmp(&b.flag));
        Ok(settings)
    }
}

/// What a file says, each value with the file's name.
#[derive(Debug, Clone)]
struct OfFile(String, Map<String, Value>);

impl Source for OfFile {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(named(&self.1, &self.0))
    }
}

fn named(table: &Map<String, Value>, file: &String) -> Map<String, Value> {
    let name = |(key, value): (&String, &Value)| {
        let kind = match &value.kind {
            ValueKind::Table(table) => ValueKind::Table(named(table, file)),
            kind => kind.clone(),
        };
        (key.clone(), Value::new(Some(file), kind))
    };
    table.iter().map(name).collect()
}

fn read(path: &Path) -> Result<String, SettingsError> {
    use std::io::Read;
    let shown = path.display();
    let failed = |error: std::io::Error| SettingsError(format!("{shown}: cannot read: {error}"));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 {
        0..=FILE_BYTES_MAX => Ok(text),
        _ => Err(SettingsError(format!("{shown}: it has more than {FILE_BYTES_MAX} bytes"))),
    }
}

fn origin(value: &Value) -> String {
    value.origin().unwrap_or("the settings").to_owned()
}

fn check_key(key: &str, value: &Value, before: &str, known: &[&str]) -> Result<(), SettingsError> {
    if known.contains(&key) {
        return Ok(());
    }
    let from = origin(value);
    let alike = known.iter().map(|other| (strsim::jaro_winkler(key, other), *other));
    let nearest = alike.filter(|(alike, _)| *alike >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0));
    let what = match nearest {
        Some((_, nearest)) => format!("did you mean {before}{nearest}?"),
        None => format!("there are {}", known.join(", ")),
    };
    Err(SettingsError(format!("{from}: there is no setting {before}{key}; {what}")))
}

/// A value as words of a command line.
fn words(value: &Value) -> Option<Vec<String>> {
    match &value.kind {
        ValueKind::Array(values) => {
            let words: Option<Vec<_>> = values.iter().map(words).collect();
            Some(words?.concat())
        }
        ValueKind::Table(_) | ValueKind::Nil => None,
        _ => value.clone().into_string().ok().map(|word| vec![word]),
    }
}

fn subcommand<'a>(command: &'a Command, name: &str) -> &'a Command {
    command.find_subcommand(name).unwrap_or(command)
}

fn flags(command: &Command) -> Vec<&str> {
    let flags = command.get_arguments().filter_map(|argument| argument.get_long());
    flags.filter(|flag| !NOT_SETTINGS.contains(flag)).collect()
}

/// What variables of a command begin with.
fn prefix(command: &str) -> String {
    format!("{PREFIX}_{}_", command.to_uppercase())
}

fn id_of(command: &Command, flag: &str) -> Option<String> {
    let mut arguments = command.get_arguments();
    let argument = arguments.find(|argument| argument.get_long() == Some(flag))?;
    Some(argument.get_id().as_str().to_owned())
}

/// Whether a flag stands in the words that were read, or has a variable of its own.
fn is_given(command: &Command, name: &str, given: &ArgMatches, flag: &str) -> bool {
    let id = id_of(subcommand(command, name), flag).or_else(|| id_of(command, flag));
    let source =
        id.and_then(|id| given.try_contains_id(&id).ok()?.then(|| given.value_source(&id)));
    matches!(source.flatten(), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
}

/// The same command line, of which no flag is required.
fn optional(command: Command, name: &str) -> Command {
    command.mut_subcommand(name, |command| command.mut_args(|argument| argument.required(false)))
}

fn raw(matches: &ArgMatches, id: &str) -> Option<String> {
    let values = matches.try_get_raw(id).ok().flatten()?;
    let words: Vec<_> = values.map(OsStr::to_string_lossy).collect();
    Some(words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str, variables: &[(&str, &str)]) -> Result<Settings, String> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables = variables.iter().map(owned).collect();
        Settings::of(Some((Path::new("lite-llm.toml"), text)), variables)
            .map_err(|error| error.to_string())
    }

    fn of<'a>(all: &'a [Setting], flag: &str) -> (Option<&'a str>, &'a str) {
        let setting = all.iter().find(|setting| setting.flag == flag).unwrap();
        (setting.value.as_deref(), &setting.origin)
    }

    #[test]
    fn flags_win_over_the_environment_over_the_file_over_defaults() {
        let text = "log = \"info\"\n[coordinator]\nmodel = \"m\"\nworkers = 3\nreplicas = 2\n\
                    patience = \"5s\"\nkv-dtype = \"bf16\"\n";
        let variables =
            [("LITE_LLM_COORDINATOR_WORKERS", "4"), ("LITE_LLM_COORDINATOR_REPLICAS", "3")];
        let settings = settings(text, &variables).unwrap();
        let words = ["--replicas".to_owned(), "4".to_owned()];
        let all = settings.in_force("coordinator", &words).unwrap();
        assert_eq!(of(&all, "replicas"), (Some("4"), "--replicas"));
        assert_eq!(of(&all, "workers"), (Some("4"), "LITE_LLM_COORDINATOR_WORKERS"));
        assert_eq!(of(&all, "patience"), (Some("5s"), "lite-llm.toml"));
        assert_eq!(of(&all, "kv-dtype"), (Some("bf16"), "lite-llm.toml"));
        assert_eq!(of(&all, "log"), (Some("info"), "lite-llm.toml"));
        assert_eq!(of(&all, "listen"), (Some("127.0.0.1:7450"), "default"));
        assert_eq!(of(&all, "context"), (None, "not set"));
        let none = Settings::of(None, Vec::new()).unwrap();
        let all = none.in_force("coordinator", &[]).unwrap();
        assert_eq!(of(&all, "model"), (None, "required, and not set"));

        // What was read is what the command gets.
        let cli = cli(&settings, &["coordinator", "--listen", "127.0.0.1:1", "--log", "debug"]);
        assert_eq!(cli.log, "debug");
        let super::super::Command::Coordinator(args) = cli.command else { panic!("coordinator") };
        assert_eq!((args.workers, args.replicas, args.model), (4, 3, PathBuf::from("m")));
        assert_eq!(args.listen.to_string(), "127.0.0.1:1");
    }

    #[track_caller]
    fn cli(settings: &Settings, words: &[&str]) -> Cli {
        let mut words: Vec<OsString> =
            ["lite-llm"].iter().chain(words).map(OsString::from).collect();
        let first = Cli::command().ignore_errors(true).try_get_matches_from(&words).unwrap();
        let (name, given) = first.subcommand().unwrap();
        words.extend(settings.words(name, given).unwrap());
        Cli::from_arg_matches(&Cli::command().try_get_matches_from(words).unwrap()).unwrap()
    }

    #[test]
    fn a_flag_may_need_what_the_file_says() {
        let text = "[coordinator]\nmodel = \"m\"\nhttp = \"127.0.0.1:0\"\n";
        let settings = settings(text, &[]).unwrap();
        let cli = cli(&settings, &["coordinator", "--http-model", "n"]);
        let super::super::Command::Coordinator(args) = cli.command else { panic!("coordinator") };
        assert_eq!(args.http.http_model.as_deref(), Some("n"));
    }

    #[test]
    fn mistakes_name_where_they_are_and_what_was_meant() {
        let error = settings("[coordinator]\nlissten = \"x\"\n", &[]).unwrap_err();
        assert_eq!(
            error,
            "lite-llm.toml: there is no setting coordinator.lissten; did you mean coordinator.listen?"
        );
        let error = settings("[cordinator]\n", &[]).unwrap_err();
        assert!(error.contains("did you mean coordinator?"), "{error}");
        let error = settings("", &[("LITE_LLM_WORKER_DRUM", "1GiB")]).unwrap_err();
        assert!(error.contains("LITE_LLM_WORKER_DRUM") && error.contains("worker.dram"), "{error}");
        let error = settings("worker = 3\n", &[]).unwrap_err();
        assert!(error.contains("worker is a section"), "{error}");
        let error = settings("[worker\n", &[]).unwrap_err();
        assert!(error.starts_with("lite-llm.toml: "), "{error}");
        let read = settings("[worker]\nthreads = 0\n", &[]).unwrap();
        let error = read.in_force("worker", &[]).unwrap_err().to_string();
        assert!(error.starts_with("lite-llm.toml: threads: ") && error.contains('0'), "{error}");
        let read = settings("[worker]\nthreads = {}\n", &[]).unwrap();
        let error = read.in_force("worker", &[]).unwrap_err().to_string();
        assert!(error.contains("threads is a text, a number"), "{error}");
        // What others call theirs is none of ours.
        settings("", &[("LITE_LLM_SHARED", "x"), ("PATH", "x")]).unwrap();
    }
}
