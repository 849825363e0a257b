"""What models write that vLLM parses: a call of each kind of tool parser, and the tags of reasoning parsers."""

# ruff: noqa: RUF001 - the tags of DeepSeek are written with a wide bar

from __future__ import annotations

from parser_texts import CALLS, SECOND, TAGS

_ARGUMENTS = '{"name": "NAME", "arguments": {"a": "VALUE"}}'
_PARAMETERS = '{"name": "NAME", "parameters": {"a": "VALUE"}}'
_XML = "<function=NAME>\n<parameter=a>\nVALUE\n</parameter>\n</function>"
# By the name of the parser: how a call is written, with NAME and VALUE in their places.
VLLM_CALLS = {
    "deepseek_v3": CALLS["deepseek-r1"],
    "deepseek_v31": CALLS["deepseek-v3.1"],
    "deepseek_v32": CALLS["deepseek-v3.2"] + "\n</｜DSML｜function_calls>",
    "deepseek_v4": CALLS["deepseek-v4"] + "\n</｜DSML｜tool_calls>",
    "ernie45": CALLS["qwen"],
    "gemma4": CALLS["gemma"],
    "glm45": CALLS["glm5"],
    "glm47": CALLS["glm5"],
    "granite": f"<|tool_call|>[{_ARGUMENTS}]",
    "granite4": CALLS["qwen"],
    "hermes": CALLS["qwen"],
    "internlm": f"<|action_start|><|plugin|>\n{_PARAMETERS}<|action_end|>",
    "jamba": f"<tool_calls>[{_ARGUMENTS}]</tool_calls>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>"
    '{"a": "VALUE"}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": CALLS["kimi-k3"] + "<|close|>tools<|sep|>",
    "llama3_json": _PARAMETERS,
    "llama4_pythonic": '[NAME(a="VALUE")]',
    "longcat": f"<longcat_tool_call>{_ARGUMENTS}</longcat_tool_call>",
    "minicpm5": CALLS["minicpm5"],
    "minimax_m2": CALLS["minimax"],
    "mistral": f"[TOOL_CALLS][{_ARGUMENTS}]",
    "pythonic": '[NAME(a="VALUE")]',
    "qwen3_coder": SECOND["qwen"],
    "qwen3_xml": SECOND["qwen"],
    "seed_oss": f"<seed:tool_call>\n{_XML}\n</seed:tool_call>",
}
# Whose call has to be all that is written, or that says one call alone.
ALONE = {"llama3_json", "llama4_pythonic", "pythonic", "internlm", "granite"}
# Of these vLLM 0.27.1 itself loses a part of the arguments as they come.
CLIPPED = {"internlm", "jamba"}

# By the name of the parser: what reasoning is between.
VLLM_REASONING = {
    **dict.fromkeys(("deepseek_r1", "deepseek_v4", "ernie45", "glm45", "glm47", "holo2"), ("<think>", "</think>")),
    **dict.fromkeys(("kimi_k2", "mimo", "minimax_m2", "nemotron_v3", "qwen3", "step3p5"), ("<think>", "</think>")),
    "step3": ("", "</think>"),
    "kimi_k3": ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}
VLLM_TAGS = (
    *TAGS,
    *("<|tool_call|>", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<tool_calls>", "</tool_calls>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_start|>", "<|python_tag|>", "[TOOL_CALLS]", "[THINK]", "[/THINK]"),
    *("<seed:tool_call>", "</seed:tool_call>", "<seed:think>", "</seed:think>"),
    *("<longcat_tool_call>", "</longcat_tool_call>"),
)
