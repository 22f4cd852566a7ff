"""Chat templates by name, for `chat_template: NAME`: how a conversation becomes text.

All are written for the Jinja environment of transformers, which drops the line break after a block.
"""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

#: A system message stands at the beginning of the first user's; roles have to take turns.
_MISTRAL = (
    "{{ bos_token }}{% set state = namespace(system='', turn='user') %}{% for message in messages %}"
    "{% if loop.first and message.role == 'system' %}{% set state.system = message.content + '\n\n' %}"
    "{% elif message.role != state.turn %}"
    "{{ raise_exception('After a system message, user and assistant have to take turns, user first.') }}"
    "{% elif message.role == 'user' %}{{ ' [INST] ' + state.system + message.content + ' [/INST]' }}"
    "{% set state.system = '' %}{% set state.turn = 'assistant' %}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% set state.turn = 'user' %}{% endif %}{% endfor %}"
)

#: The role `user_context` is the input that an instruction works on.
_ALPACA = (
    "{% set titles = {'user': '### Instruction:', 'user_context': '### Input:', 'assistant': '### Response:'} %}"
    "{% for message in messages %}"
    "{% if message.role in titles %}{{ titles[message.role] + '\n' }}{% endif %}"
    "{{ (message.content | trim) + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ titles['assistant'] + '\n' }}{% endif %}"
)

#: There is always a system message, if only an empty one; a user's turn ends with the line.
_EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
    "{{ '[|' + message.role + '|]' + message.content + ('\n' if message.role == 'user' else '[|endofturn|]\n') }}"
    "{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
)

#: Name -> template.
CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
