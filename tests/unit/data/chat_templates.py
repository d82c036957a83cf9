"""Small chat templates that behave as those of current models do, each with what is particular to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)


def _chatml(turn: str, ask: str = "", before: str = "") -> str:
    """Turns between <|im_start|> and <|im_end|>, with `turn` of the assistant's."""
    return (
        TOOLS + before + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        f"{turn}{CALLS}<|im_end|>\n{{% else %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n"
        f"{{% endif %}}{{% endfor %}}{ASK}{ask}{{% endif %}}"
    )


def _stripped(thought: str, empty: str = "") -> str:
    """A thought before the last answer alone, and `empty` in its place where there is none."""
    return (
        "{% if loop.index0 > ns.last and m.reasoning_content %}" + thought
        + "{% elif loop.index0 > ns.last %}" + empty + "{% endif %}{{ m.content }}"
    )  # fmt: skip


THOUGHT = "<think>\n{{ m.reasoning_content }}\n</think>\n\n"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)


@dataclass(frozen=True)
class ChatStyle:
    """A template and what it does.

    Attributes:
        stays: whether a conversation's start is written alike once it goes on.
        thought: what of the reasoning "two and two" a response to a last question has; None: it is not read.
        tools: whether it writes calls and results.
        system: whether it has a system turn; False: the prompt goes into the user's.
        parts: whether it writes contents as parts alone.
        opened: what its prompt has that finished turns without reasoning have not -> what closes it there.
    """

    template: str
    eos: str = "<|im_end|>"
    stays: bool = True
    thought: str | None = None
    tools: bool = True
    system: bool = True
    opened: tuple[str, str] | None = None
    parts: bool = False

    def make(self):
        """A tokenizer of one token per byte, and one for each of its marks."""
        from transformers import PreTrainedTokenizerFast

        from unit.data.tokenizers_small import byte_level

        marks = re.findall(r"</?[|\uff5c]?[a-z_]+[|\uff5c]?>|\[/?[A-Z_]+\]", self.template)
        specials = list(dict.fromkeys(["<|bos|>", self.eos, *marks]))
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level(specials), eos_token=self.eos, chat_template=self.template
        )


CHAT_STYLES = {
    "qwen2.5": ChatStyle(_chatml("{{ m.content }}")),
    "qwen3": ChatStyle(
        _chatml(
            _stripped(THOUGHT, "<think>\n\n</think>\n\n"),
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
            LAST_USER,
        ),
        stays=False,
        thought="<think>\ntwo and two\n</think>\n\n",
    ),
    "qwen3.5 thinking": ChatStyle(
        _chatml(_stripped(THOUGHT, "<think>\n\n</think>\n\n"), "<think>\n", LAST_USER),
        stays=False,
        thought="two and two\n</think>\n\n",
    ),
    "qwen3.5": ChatStyle(
        _chatml(
            _stripped(THOUGHT, "<think>\n\n</think>\n\n"),
            "{% if enable_thinking is defined and enable_thinking %}<think>\n"
            "{% else %}<think>\n\n</think>\n\n{% endif %}",
            LAST_USER,
        ),
        stays=False,
        thought="two and two\n</think>\n\n",
    ),
    "nemotron": ChatStyle(
        _chatml(_stripped(THOUGHT, "<think></think>"), "<think>\n", LAST_USER),
        stays=False,
        thought="two and two\n</think>\n\n",
        opened=("\n", "</think>"),
    ),
    "deepseek": ChatStyle(
        "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<\uff5cuser\uff5c>{{ m.content }}"
        "{% elif m.role == 'system' %}{{ m.content }}{% elif m.role == 'tool' %}<\uff5ctool\uff5c>"
        "{{ m.content }}{% else %}<\uff5cassistant\uff5c>{{ m['content'] + '' }}"
        "{% for c in m.tool_calls or [] %}<\uff5ccall\uff5c>"
        "{{ c.type + ' ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
        "<\uff5cend\uff5c>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cassistant\uff5c><think>\n{% endif %}",
        "<\uff5cend\uff5c>",
        stays=False,
        thought="two and two\n</think>\n\n",
        opened=("<think>\n", "\n</think>\n\n"),
    ),
    "phi-3": ChatStyle(
        "{% for m in messages %}{% if m.role in ['user', 'assistant', 'system'] %}"
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        stays=False,
        tools=False,
    ),
    "gpt-oss": ChatStyle(
        "<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis"
        "<|message|>{{ m.thinking }}<|end|>{% endif %}{% if m.tool_calls %}<|start|>assistant to="
        "{{ m.tool_calls[0].function.name }}<|message|>{{ m.tool_calls[0].function.arguments | tojson }}"
        "<|call|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content | tojson }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
        stays=False,
        thought="<|channel|>analysis<|message|>two and two<|end|>",
    ),
    "llama-3.2": ChatStyle(
        "<|bos|>{% if not date_string is defined %}{% set date_string = strftime_now(\"%d %b %Y\") %}"
        "{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "<|start_id|>system<|end_id|>\nToday Date: {{ date_string }}\n\n{{ system }}"
        "{{ tools | tojson if tools }}<|eot_id|>"
        "{% for m in messages %}<|start_id|>{{ m.role }}<|end_id|>\n\n{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_id|>assistant<|end_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": ChatStyle(
        "<|bos|>{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[INST]{{ system if loop.first }}"
        "{{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT]{{ m.content }}"
        " {{ m.tool_call_id }}[/RESULT]"
        "{% elif m.tool_calls %}[CALL]{{ m.tool_calls | tojson }}{{ eos_token }}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "gemma": ChatStyle(
        "<|bos|>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + ALTERNATING
        + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<eos>",
        tools=False,
        system=False,
    ),
    "glm-4.5": ChatStyle(
        LAST_USER
        + "<|bos|>{{ tools | tojson if tools }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|assistant|>\n{% if m.reasoning_content and loop.index0 > ns.last %}"
        "<think>{{ m.reasoning_content }}</think>"
        "{% else %}<think></think>{% endif %}{{ '\n' + m.content }}"
        + CALLS
        + "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}{% else %}"
        "<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>",
        thought="<think>two and two</think>\n",
    ),
    "cohere": ChatStyle(
        "<|bos|>{% if messages[0].role == 'system' %}<|start|><|system|>{{ messages[0].content }}<|end|>"
        "{% set messages = messages[1:] %}{% endif %}" + ALTERNATING + "<|start|><|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|><|assistant|>{% endif %}",
        "<|end|>",
        tools=False,
    ),
    "lfm2": ChatStyle(
        TOOLS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set text = m.content %}"
        "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}{{ text }}" + CALLS
        + "<|im_end|>\n{% endfor %}" + ASK + "{% endif %}",
    ),
    "content parts alone": ChatStyle(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role + ':' }}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ ' ' + part.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "<end>",
        tools=False,
        parts=True,
    ),
    "with marks": ChatStyle(
        _chatml("{% generation %}{{ m.content }}").replace(
            f"{CALLS}<|im_end|>\n", f"{CALLS}<|im_end|>{{% endgeneration %}}{{{{ '\\n' }}}}"
        )
    ),
}  # fmt: skip
