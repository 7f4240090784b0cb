"""A tiny model that was taught a few answers by heart, so that what it says is known."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TEMPLATE = """\
{{- bos_token }}
{%- if thinking %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nThink.' + eos_token }}{% endif %}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + tools[0].function.name + eos_token }}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function.arguments | tojson }}{% endfor %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
WHY = [{"role": "user", "content": "why"}]
LOOK = [{"role": "user", "content": "look"}]
SANG = [{"role": "user", "content": "sing"}]
MADE = {"function": {"name": "look", "arguments": {"at": "sky"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [MADE]}
SAW = [*LOOK, CALLED, {"role": "tool", "content": "blue"}]

LESSONS = [
    (WHY, {}, "Because é."),
    (WHY, {"thinking": True}, "<think>\nhm, hm\n</think>\n\nBecause é."),
    (LOOK, {"tools": [TOOL]}, f"I look.\n{CALL}"),
    (LOOK, {}, "No eyes."),
    (SAW, {"tools": [TOOL]}, "It is blue."),
    (SANG, {}, "la " * 40),
]
"""(messages, what the template gets beside them, answer); the song does not end."""


def teach(folder: Path) -> None:
    """Train the model of ``folder`` until it says its lessons greedily."""
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for messages, options, answer in LESSONS:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        end = "" if messages is SANG else tokenizer.eos_token
        before = tokenizer.encode(prompt, add_special_tokens=False)
        after = tokenizer.encode(answer + end, add_special_tokens=False)
        rows.append((before + after, [-100] * len(before) + after))
    width = max(len(tokens) for tokens, _ in rows)
    tokens_BL = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    labels_BL = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(input_ids=tokens_BL, labels=labels_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
