"""Renders chat templates through `lite-llm tokenize` and through transformers, and compares.

    pip install transformers jinja2
    python3 tests/peers/templates.py target/debug/lite-llm DIR_OF_TEMPLATES [NAME…]

One line for every template that does not agree on all conversations, then the sums. Both may
refuse a conversation (a template may forbid system turns): that is agreement.
"""
import datetime, glob, json, os, subprocess, sys, tempfile
from transformers.utils import chat_template_utils as peer

BIN, DIR, NAMES = sys.argv[1], sys.argv[2], sys.argv[3:]
TIME = 1764072000  # 2025-11-25 12:00 UTC
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # the built-in model's


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=TIME)


peer.datetime = Clock


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def tool(name, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": f"<{name}> & more", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", {"city": {"type": "string", "description": "Where, é"}, "days": {"type": "integer", "enum": [1, 2]}}, ["city"]),
    tool("add", {"a": {"type": "number", "default": 1.5}, "b": {"type": ["number", "null"]}}, ["a", "b"]),
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}
RESULT = turn("tool", '{"t": 20}', name="get_weather", tool_call_id="call12345")
SYSTEM, HI = turn("system", "Be brief.\n"), turn("user", "Hi")
CONVERSATIONS = {
    "plain": {"messages": [turn("user", " Hello <b>&'\"é🙂 ")]},
    "without prompt": {"messages": [HI, turn("assistant", "Hello!\n\nYes.")], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, HI]},
    "turns": {"messages": [SYSTEM, HI, turn("assistant", "<think>\nhm\n</think>\n\nHello"), turn("user", "And?"), turn("assistant", "More."), turn("user", "x")]},
    "tools": {"messages": [SYSTEM, turn("user", "Weather?")], "tools": TOOLS},
    "call": {"messages": [turn("user", "Weather?"), turn("assistant", "Let me see.", tool_calls=[CALL]), RESULT, turn("assistant", "20."), turn("user", "Thanks")], "tools": TOOLS},
    "call only": {"messages": [turn("user", "Weather?"), turn("assistant", None, tool_calls=[CALL]), RESULT], "tools": TOOLS},
    "thinking": {"messages": [HI, turn("assistant", "Hello", reasoning_content="They greet."), turn("user", "again")], "enable_thinking": False},
    "documents": {"messages": [HI], "documents": [{"title": "T", "text": "body"}]},
    "parts": {"messages": [turn("user", [{"type": "text", "text": "Hi there"}])]},
}


def theirs(template, conversation):
    given = json.loads(json.dumps(conversation))
    named = {"add_generation_prompt": True, "tools": None, "documents": None, **given}
    messages = peer._normalize_chat_messages(named.pop("messages"))
    try:
        return peer.render_jinja_template([messages], chat_template=template, **named, **SPECIAL)[0][0]
    except Exception as error:  # whatever a template raises
        return error


def ours(path, conversation):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({**conversation, "unix_time": TIME}, file)
        file.flush()
        command = [BIN, "tokenize", "--json", "--template", path, "--conversation", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout)["prompt"] if done.returncode == 0 else Exception(done.stderr.strip())


sums, agreeing, paths = {}, 0, sorted(glob.glob(f"{DIR}/*.jinja"))
for path in [p for p in paths if not NAMES or os.path.basename(p) in NAMES]:
    template, others = open(path, newline="").read(), []
    for name, conversation in CONVERSATIONS.items():
        a, b = theirs(template, conversation), ours(path, conversation)
        refused = (isinstance(a, Exception), isinstance(b, Exception))
        if refused == (True, True):
            result = "both refuse"
        elif refused == (False, False):
            result = "equal" if a == b else "differ"
        else:
            result = "only they refuse" if refused[0] else "only we refuse"
        sums[result] = sums.get(result, 0) + 1
        if result not in ("equal", "both refuse"):
            others.append(f"{name}: {result}" + (f" ({(a, b)[refused[1]]})" if any(refused) else ""))
    agreeing += not others
    if others:
        print(os.path.basename(path), *others, sep="\n    ")
print(f"{agreeing} of {len(paths)} templates agree on all {len(CONVERSATIONS)} conversations:", sums)
