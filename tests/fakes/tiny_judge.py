"""The tiny model, overfitted on the verdicts for a few replies: a real judge for these replies on a real server."""

from collections.abc import Sequence
from pathlib import Path

from sdft.services.grading.judge import PROMPT
from tests.fakes.tiny import make_tiny_model


def make_tiny_judge(folder: Path, items: Sequence[tuple[str, str, str]], verdicts: Sequence[str]) -> Path:
    """Write a model that answers the judge's prompt for each (question, answer, reply) with its verdict."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    conversations = []
    for (question, answer, reply), said in zip(items, verdicts, strict=True):
        message = {"role": "user", "content": PROMPT.format(question=question, answer=answer, reply=reply)}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        conversations.append((prompt, [*tokenizer.encode(said), tokenizer.eos_token_id]))
    for _ in range(200):
        losses = []
        for prompt, wanted in conversations:
            logits = model(torch.tensor([prompt + wanted])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)))
        loss = torch.stack(losses).mean()
        if loss < 0.01:
            model.save_pretrained(folder)
            return folder
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the tiny judge has not learnt its verdicts: its loss is {loss:.3f}")
