"""Classes of a user's own: found in the working directory too, and refused in a sentence whatever is wrong."""

from pathlib import Path

import pytest

from sdft.actors.shared.own_code import NotImportable, is_own, own_class


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class Mine(dict):\n    pass\n", None),
        ("class Mine:\n    pass\n", "is not a subclass of builtins.dict; derive it from that class"),
        ("Mine = dict()\n", "is not a subclass of builtins.dict"),
        ("class Mine(dict)\n", r"cannot be imported \(SyntaxError: "),
        ("1 / 0\n", r"cannot be imported \(ZeroDivisionError: division by zero\); write it as package.module:Name"),
    ],
)
def test_a_class_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, text: str, reason: str | None
) -> None:
    module = f"own_{abs(hash(request.node.name))}"  # a name that no other case has imported
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert is_own(f"{module}:Mine")
    if reason is None:
        assert own_class(f"{module}:Mine", dict).__name__ == "Mine"
        return
    with pytest.raises(NotImportable, match=reason):
        own_class(f"{module}:Mine", dict)
