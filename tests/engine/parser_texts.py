"""What models write that Xinference parses: a call of each tool parser, and reasoning in the tags of each model."""

# ruff: noqa: RUF001 - the tags of DeepSeek are written with a wide bar

from __future__ import annotations

from dataclasses import dataclass

BEGUN = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
ENDED = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def _dsml(block: str, space: str = "") -> tuple[str, str]:
    """A block's first call, and its last one."""
    tag = f"｜DSML｜{space}"
    parameter = f'<{tag}parameter name="a" string="true">VALUE</{tag}parameter>'
    invoke = f'<{tag}invoke name="NAME">\n{parameter}\n</{tag}invoke>'
    return f"<{tag}{block}>\n{invoke}", f"{invoke}\n</{tag}{block}>"


DSML = {
    "deepseek-v3.2": _dsml("function_calls"),
    "deepseek-v4": _dsml("tool_calls"),
    "deepseek-v4.1": _dsml("calls", " "),
}
# By the name under which Xinference registers its parser: how a call is written, with NAME and VALUE in their places.
CALLS = {
    "deepseek-r1": BEGUN + 'function<｜tool▁sep｜>NAME\n```json\n{"a": "VALUE"}\n```' + ENDED,
    "deepseek-v3": '```json\n{"name": "NAME", "parameters": {"a": "VALUE"}}\n```',
    "deepseek-v3.1": BEGUN + 'NAME<｜tool▁sep｜>{"a": "VALUE"}' + ENDED,
    **{name: first for name, (first, _) in DSML.items()},
    "gemma": '<|tool_call>call:NAME{a:<|"|>VALUE<|"|>}<tool_call|>',
    "glm4": '{"name": "NAME", "arguments": "{\\"a\\": \\"VALUE\\"}"}',
    "glm5": "<tool_call>NAME\n<arg_key>a</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
    "kimi-k3": '<|open|>tools<|sep|><|open|>call tool="NAME"<|sep|><|open|>argument key="a" type="string"<|sep|>VALUE'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
    "llama3": '{"name": "NAME", "parameters": {"a": "VALUE"}}',
    "minicpm5": '<function name="NAME"><param name="a">VALUE</param></function>',
    "minimax": '<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="a">VALUE</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "minimax_m3": '<minimax:tool_call>\n<invoke name="NAME"><a>VALUE</a></invoke>\n</minimax:tool_call>',
    "qwen": '<tool_call>\n{"name": "NAME", "arguments": {"a": "VALUE"}}\n</tool_call>',
}
# The second call of a text, where it is not written like the first: another format, or a part of the same block.
SECOND = {
    **{name: last for name, (_, last) in DSML.items()},
    "kimi-k3": CALLS["kimi-k3"].removeprefix("<|open|>tools<|sep|>") + "<|close|>tools<|sep|>",
    "qwen": "<tool_call>\n<function=NAME>\n<parameter=a>\nVALUE\n</parameter>\n</function>\n</tool_call>",
}

# What is one token in the vocabularies of these models.
TAGS = (
    *("<think>", "</think>", "<mm:think>", "</mm:think>", "<|channel>", "<channel|>", "<tool_call>", "</tool_call>"),
    *("<|open|>", "<|close|>", "<|sep|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "｜DSML｜", "<|tool_call>", "<tool_call|>", '<|"|>', "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>"),
    *("<minimax:tool_call>", "</minimax:tool_call>", "<function", "</function>", "<invoke", "</invoke>"),
    *("<parameter", "</parameter>", "<param", "</param>", "</｜DSML｜", "analysis", "assistantfinal"),
)


@dataclass(frozen=True)
class Text:
    """One answer of a model.

    Attributes:
        finish: why the engine stopped.
    """

    name: str
    text: str
    finish: str = "stop"


def answers(parser: str | None, start: str | None, end: str | None) -> list[Text]:
    """Answers of a model whose tool calls ``parser`` reads, with reasoning between ``start`` and ``end``."""
    thought = f"{start}Hm, é 灯{end}" if start else ""
    call = CALLS.get(parser or "", '{"NAME": "VALUE"}')
    one, two = _filled(call, "f", "ü灯"), _filled(SECOND.get(parser or "", call), "g", "é")
    return [
        Text("text", f"{thought}Grüße, 灯塔 <b <"),
        Text("everything", f"{thought}Ja: {one} und {two} ü."),
        Text("calls at once", one + two),
        Text("a broken call", f"{thought}{one[: len(one) * 2 // 3]}{one[len(one) * 5 // 6 :]} ö {two}"),
        Text("an unfinished call", f"{thought}{one}{two[: len(two) * 3 // 4]}", "length"),
        Text("unfinished reasoning", f"{thought[: -len(end or 'x')]} noch", "length"),
    ]


def _filled(call: str, name: str, value: str) -> str:
    return call.replace("NAME", name).replace("VALUE", value)


# Of gpt-oss, whose tags are channels where no tools are given.
HARMONY = [
    Text(
        "text", "<|channel|>analysis<|message|>Hm, é<|end|><|start|>assistant<|channel|>final<|message|>灯 ü<|return|>"
    ),
    Text("everything", "analysisHm, é 灯assistantfinalJa, ü."),
    Text("unfinished reasoning", "<|channel|>analysis<|message|>Hm, é assist", "length"),
]
