"""What the unmodified `openai` package does with a cluster: run by openai.rs with the API's URL, and
the text that `submit` gave for SUBMITTED as JSON on standard input."""

import json
import sys
import time

import openai

URL, KEY = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else "none")
SUBMITTED = json.load(sys.stdin)
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=60)
[MODEL] = [model.id for model in client.models.list()]
PROMPT = "ls - list"
SAME = dict(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0.7, seed=7, extra_body={"top_k": 40})


def refused(kind, param=None, code=None, **more):
    try:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **more})
    except kind as error:
        assert error.param == param, error
        assert code is None or error.code == code, error
        return
    raise AssertionError(f"{more} was not refused")


def models():
    card = client.models.retrieve(MODEL)
    assert card.id == MODEL and card.object == "model", card
    try:
        client.models.retrieve("other")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error


def completion():
    answer = client.completions.create(**SAME)
    [choice] = answer.choices
    assert choice.text == SUBMITTED["text"], (choice.text, SUBMITTED)
    assert choice.finish_reason == "length" and answer.seed == 7, answer
    usage = answer.usage
    assert usage.completion_tokens == 24 and usage.total_tokens == usage.prompt_tokens + 24, usage
    assert answer.system_fingerprint.startswith("fp_"), answer


def token_ids():
    a = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, temperature=0)
    b = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8]], max_tokens=4, temperature=0)
    assert len(b.choices) == 2 and b.choices[0].text == a.choices[0].text, (a, b)
    assert a.usage.prompt_tokens == 3 and b.usage.prompt_tokens == 4, (a.usage, b.usage)


def streaming():
    text, finish, usage = "", None, None
    for chunk in client.completions.create(**SAME, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.text
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert text == SUBMITTED["text"], (text, SUBMITTED)
    assert finish == "length" and usage.completion_tokens == 24, (finish, usage)


def several():
    answer = client.completions.create(**{**SAME, "n": 3})
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == SUBMITTED["text"] and len(set(texts)) == 3, texts
    # The next of the n has the next seed, whoever asks.
    alone = client.completions.create(**{**SAME, "seed": 8})
    assert alone.choices[0].text == texts[1], (alone, texts)
    streamed = ["", "", ""]
    for chunk in client.completions.create(**{**SAME, "n": 3}, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts, (streamed, texts)


def stops():
    word = SUBMITTED["text"].split()[3]
    before = SUBMITTED["text"][: SUBMITTED["text"].index(word)]
    answer = client.completions.create(**SAME, stop=[word, "never to be seen"])
    assert answer.choices[0].text == before, (answer, before)
    assert answer.choices[0].finish_reason == "stop", answer
    chunks = client.completions.create(**SAME, stop=word, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == before


def chat():
    messages = [{"role": "system", "content": "ls"}, {"role": "user", "content": [{"type": "text", "text": "- list"}]}]
    asked = dict(model=MODEL, messages=messages, max_completion_tokens=12, temperature=0, seed=3)
    answer = client.chat.completions.create(**asked)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content, answer
    assert choice.finish_reason in ("length", "stop"), answer
    text, roles = "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        roles += [delta.role] if delta.role else []
        text += delta.content or ""
    assert text == choice.message.content and roles == ["assistant"], (text, answer)
    # What came back can be sent again.
    again = messages + [choice.message.model_dump()] + [{"role": "user", "content": "go on"}]
    client.chat.completions.create(**{**asked, "messages": again})


def responses():
    asked = dict(model=MODEL, input=PROMPT, max_output_tokens=12, temperature=0, extra_body={"seed": 3})
    answer = client.responses.create(**asked)
    chat = dict(model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=12, temperature=0, seed=3)
    assert answer.output_text == client.chat.completions.create(**chat).choices[0].message.content, answer
    assert answer.status in ("incomplete", "completed") and answer.usage.total_tokens > 12, answer
    text, last = "", None
    for event in client.responses.create(**asked, stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert text == answer.output_text and last.response.output_text == text, (text, last)
    assert last.type in ("response.incomplete", "response.completed"), last
    # What came back can be sent again.
    again = [{"role": "user", "content": PROMPT}, answer.output[0].model_dump(), {"role": "user", "content": "go on"}]
    client.responses.create(**{**asked, "input": again}, instructions="be brief")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    told = client.responses.create(**{**asked, "max_output_tokens": 60}, text=form)
    assert json.loads(told.output_text)["a"] in (1, 2), told
    for bad in (dict(previous_response_id="resp_1"), dict(background=True), dict(tools=[{"type": "web_search"}])):
        try:
            client.responses.create(**asked, **bad)
        except openai.BadRequestError as error:
            assert error.code == "unsupported_parameter", error
            continue
        raise AssertionError(f"{bad} was taken")


def logprobs():
    asked = dict(model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=6, temperature=0)
    plain = client.chat.completions.create(**asked).choices[0].message.content
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=4)
    assert answer.choices[0].message.content == plain, "being looked at changes nothing"
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 6, tokens
    for token in tokens:
        assert len(token.top_logprobs) == 4, token
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0, token
        assert token.token == token.top_logprobs[0].token, token
        ranked = [top.logprob for top in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True), token
    streamed = []
    for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=4, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == tokens, (streamed, tokens)
    old = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2)
    told = old.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 3, told
    assert told.text_offset[0] == 0, told


def choosing():
    base = dict(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, logprobs=1)
    first = client.completions.create(**base)
    ids = client.completions.create(**base, extra_body={"min_p": 1.0})
    assert ids.choices[0].text == first.choices[0].text
    likely = client.completions.create(**{**base, "temperature": 1, "seed": 5}, extra_body={"min_p": 1.0})
    assert likely.choices[0].text == first.choices[0].text, "only the best may be chosen"
    other = client.completions.create(**base, frequency_penalty=2, presence_penalty=2)
    repeats = lambda answer: len(answer.choices[0].logprobs.tokens) - len(set(answer.choices[0].logprobs.tokens))
    assert repeats(other) == 0, other
    client.completions.create(**base, extra_body={"repetition_penalty": 1.3})
    forced = client.completions.create(**{**base, "max_tokens": 3}, logit_bias={"70": 100})
    assert len(set(forced.choices[0].logprobs.tokens)) == 1, forced
    token = forced.choices[0].logprobs.tokens[0]
    never = client.completions.create(**{**base, "temperature": 5, "seed": 1}, logit_bias={"70": -100})
    assert token not in never.choices[0].logprobs.tokens, never


def refusals():
    refused(openai.NotFoundError, model="gpt-4o", param="model", code="model_not_found")
    refused(openai.BadRequestError, n=0, param="n")
    refused(openai.BadRequestError, temperature=-1)
    refused(openai.BadRequestError, top_p=0)
    refused(openai.BadRequestError, echo=True, param="echo", code="unsupported_parameter")
    refused(openai.BadRequestError, suffix="x", param="suffix", code="unsupported_parameter")
    refused(openai.BadRequestError, prompt=[1 << 30])
    refused(openai.BadRequestError, prompt=[1] * 5000, param="prompt", code="context_length_exceeded")
    refused(openai.BadRequestError, extra_body={"temprature": 1})
    refused(openai.BadRequestError, extra_body={"tiers": "no_such_tier"})
    refused(openai.InternalServerError, extra_body={"deadline_ms": 1}, max_tokens=500, param="deadline_ms", code="deadline_exceeded")


def tools():
    # The demo's template tells the model nothing of tools, so they are refused, and not left out in silence.
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    asked = dict(model=MODEL, max_tokens=4, temperature=0, tools=[{"type": "function", "function": function}])
    question = {"role": "user", "content": "1 + 2?"}
    try:
        client.chat.completions.create(**asked, messages=[question])
        raise AssertionError("tools were left out in silence")
    except openai.BadRequestError as error:
        assert error.param == "tools" and error.code == "unsupported_parameter", error
    # Where they are not to be called, an earlier conversation with calls in it goes on.
    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}
    said = [question, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "call_0"}]
    answer = client.chat.completions.create(**asked, messages=said, tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls, answer


def leaving():
    # One that leaves in the middle takes its job along; what is left is seen by the test in Rust.
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()


def structured():
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ls", "cat"]}, "flags": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "flags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "command", "schema": schema, "strict": True}}
    asked = dict(model=MODEL, messages=[{"role": "user", "content": PROMPT}], seed=5, temperature=1.2)
    answer = client.chat.completions.create(**asked, max_tokens=60, response_format=form)
    found = json.loads(answer.choices[0].message.content)
    assert found["name"] in ("ls", "cat") and 0 <= found["flags"] <= 9 and len(found) == 2, found
    assert answer.choices[0].finish_reason == "stop", answer
    again = client.chat.completions.create(**asked, max_tokens=60, response_format=form)
    assert again.choices[0].message.content == answer.choices[0].message.content
    streamed = client.chat.completions.create(**asked, max_tokens=60, response_format=form, stream=True)
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == answer.choices[0].message.content, text
    regex = client.chat.completions.create(**asked, max_tokens=20, extra_body={"regex": "[ab]{4}"})
    assert len(regex.choices[0].message.content) == 4, regex
    tool = {"type": "function", "function": {"name": "show", "parameters": schema}}
    named = {"type": "function", "function": {"name": "show"}}
    for choice, finish in ((named, "stop"), ("required", "tool_calls")):
        answer = client.chat.completions.create(**asked, max_tokens=80, tools=[tool], tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "show", answer
        assert json.loads(call.function.arguments)["name"] in ("ls", "cat"), answer
        assert answer.choices[0].finish_reason == finish, answer
    refused(openai.BadRequestError, "response_format", extra_body={"regex": "("})


def batches():
    def line(number, **more):
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0.7, "top_k": 40, "seed": 7 + number, **more}
        return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body})

    def upload(text):
        return client.files.create(file=("jobs.jsonl", text.encode()), purpose="batch")

    def make(file):
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"of": "a test"}
        )

    def over(batch):
        begun = time.time()
        while batch.status == "in_progress":
            assert time.time() - begun < 50, batch
            time.sleep(0.1)
            batch = client.batches.retrieve(batch.id)
        return batch

    text = "\n".join([line(0), line(1, frequency_penalty=1.0), line(2, max_tokens=3)]) + "\n"
    file = upload(text)
    assert file.bytes == len(text) and file.purpose == "batch" and file.filename == "jobs.jsonl", file
    assert client.files.content(file.id).text == text
    assert file.id in [one.id for one in client.files.list()], file
    batch = make(file)
    assert batch.request_counts.total == 3 and batch.metadata == {"of": "a test"}, batch
    batch = over(batch)
    assert batch.status == "completed" and batch.request_counts.completed == 3, batch
    assert batch.error_file_id is None, batch
    lines = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in lines] == ["c0", "c1", "c2"], lines
    bodies = [one["response"]["body"] for one in lines]
    assert bodies[0]["choices"][0]["text"] == SUBMITTED["text"], (bodies[0], SUBMITTED)
    # A line has the text that its request has alone: what it asks of the choice of its tokens is kept.
    alone = client.completions.create(**{**SAME, "seed": 8}, frequency_penalty=1.0)
    assert bodies[1]["choices"][0]["text"] == alone.choices[0].text, (bodies[1], alone)
    assert bodies[2]["usage"]["completion_tokens"] == 3, bodies[2]
    assert client.files.retrieve(batch.output_file_id).bytes == len(client.files.content(batch.output_file_id).content)
    assert [one.id for one in client.batches.list(limit=1)][0] == batch.id

    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    batch = over(make(upload(line(5, response_format=form, max_tokens=40))))
    [one] = client.files.content(batch.output_file_id).text.splitlines()
    assert json.loads(json.loads(one)["response"]["body"]["choices"][0]["text"])["a"] in (1, 2), one

    long = upload("\n".join(line(number, max_tokens=900, ignore_eos=True) for number in range(40)))
    batch = client.batches.cancel(make(long).id)
    batch = over(batch)
    assert batch.status == "cancelled", batch
    errors = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(errors[0])["error"]["code"] == "batch_cancelled", errors[0]

    for bad, words in (
        ("not json", "line 1"),
        (line(0) + "\n" + line(0), "line 2: custom_id"),
        (line(0) + "\n" + line(1, temprature=1), "line 2: "),
        (line(0, n=2), "line of its own"),
        (line(0, stream=True), "stream"),
        (line(0, logprobs=1), "log-probabilities"),
        (line(0, priority=9), "priority"),
        ("\n\n", "no requests"),
    ):
        try:
            make(upload(bad))
        except (openai.BadRequestError, openai.PermissionDeniedError) as error:
            assert words in error.message, (words, error)
        else:
            raise AssertionError(f"{bad} was taken")
    client.files.delete(file.id)
    for gone in (lambda: client.files.content(file.id), lambda: client.batches.retrieve("batch_999999")):
        try:
            gone()
        except openai.NotFoundError:
            continue
        raise AssertionError("what is not there was found")


for case in (models, completion, token_ids, streaming, several, stops, chat, responses, logprobs, choosing, refusals, tools, structured, batches, leaving):
    case()
    print(case.__name__, "ok", flush=True)
