"""Compilers in processes of their own: what is missing, aborts or hangs is told."""

import pytest

from longattn.analysis import aot


def double(request):
    if request["x"] < 0:
        raise NotImplementedError("negative numbers are not doubled")
    return {"y": 2 * request["x"]}


def test_call_answers_or_gives_the_reason():
    assert aot.call("tests.analysis.test_aot:double", {"x": 2}, {}, 60) == {"y": 4}
    refused = aot.call("tests.analysis.test_aot:double", {"x": -1}, {}, 60)
    assert refused == {"reason": "NotImplementedError: negative numbers are not doubled"}


def test_missing_compiler_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(aot.FOLDER, raising=False)
    with pytest.raises(ValueError, match=r'pip install "longattn\[aot\]"'):
        aot.libtpu_folder()
    monkeypatch.setenv(aot.FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="holds no libtpu"):
        aot.libtpu_folder()
