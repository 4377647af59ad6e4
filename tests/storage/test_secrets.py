"""Secrets of every kind are hidden from what is printed and journaled, and nothing else is."""

import json

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.connection import query
from eclectus.storage.secrets import scrub, scrubbed

SECRET = "Pl4nted+Secret/0123=="
TEXTS = [
    ("s3://me:{0}@host/x", "s3://me:***@host/x"),
    ("https://me:p@ss@host/x", "https://me:***@host/x"),
    ("https://me:p/a:ss@host:80/x?y=1", "https://me:***@host:80/x?y=1"),
    ("redis://:{0}@host:6379/0", "redis://:***@host:6379/0"),
    ("postgresql+asyncpg://me:{0}@db/x and more", "postgresql+asyncpg://me:***@db/x and more"),
    ("a s3://u:one@h/x,s3://v:two@h/y", "a s3://u:***@h/x,s3://v:***@h/y"),
    ("https://hf_AbCdEfGhIjKlMnOpQrSt@host/x", "https://***@host/x"),
    ("https://host/x?sig={0}&se=2026", "https://host/x?sig=***&se=2026"),
    ("https://h/x?a=1&X-Amz-Credential=AKIA/2026/s3&X-Amz-Date=1", "https://h/x?a=1&X-Amz-Credential=***&X-Amz-Date=1"),
    ("https://h/x?X-Amz-Signature={0}", "https://h/x?X-Amz-Signature=***"),
    ("https://h/x?x-goog-signature=abc&b", "https://h/x?x-goog-signature=***&b"),
    ("https://h/x?AWSAccessKeyId=abc&Signature=def", "https://h/x?AWSAccessKeyId=***&Signature=***"),
    ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
    ("https://h/x?token=a;b=1", "https://h/x?token=***;b=1"),
    ("s3://bucket/x?key=AAA;secret=BBB;region=r", "s3://bucket/x?key=***;secret=***;region=r"),
    ("key=AAA;secret=BBB", "key=***;secret=***"),
    ("DefaultEndpointsProtocol=https;AccountName=n;AccountKey={0};EndpointSuffix=s",
     "DefaultEndpointsProtocol=https;AccountName=n;AccountKey=***;EndpointSuffix=s"),
    ("SharedAccessSignature=sv&sig=abc", "SharedAccessSignature=***&sig=***"),
    ("aws_secret_access_key={0} done", "aws_secret_access_key=*** done"),
    ("password={0}, user=me", "password=***, user=me"),
    ("{{'password': 'abc', 'user': 'me'}}", "{{'password': '***', 'user': 'me'}}"),
    ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
    ("'authorization': 'Basic bWU6aHVudGVy'", "'authorization': 'Basic ***'"),
    ("401 for hf_AbCdEfGhIjKlMnOpQrSt.", "401 for ***."),
    ("cloned with ghp_0123456789abcdefghij!", "cloned with ***!"),
    ("AKIAIOSFODNN7EXAMPLE is known", "*** is known"),
    ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0xx.abc_def", "jwt ***"),
]  # fmt: skip
PLAIN = [
    "dataset:owner/name@main:config", "https://host:8080/x?page=2&sort=key", "the token=... of a tokenizer",
    "key=label",     "sort by key=lambda", "s3://models/a@b", "mail me@host.org", "eos_token: <|endoftext|>",
    "Basic settings are these",
    "hf_hub_download", "https://h:80/a b@c", "secrets", "signature of a function", "bits_per_byte=1.5", "sk-SK",
    '{"token": "<s>", "key": "a1b2", "seed": 3}', "x?key", "risk-averse-and-more-words-in-a-row",
    "checkpoint-0123456789ab",
    "asia" * 6, "password", "author=somebody", "AUTHORITY",
]  # fmt: skip


@pytest.mark.parametrize(("text", "hidden"), TEXTS)
def test_a_secret_in_a_text_is_hidden_and_the_rest_stays(text, hidden):
    text, hidden = text.format(SECRET), hidden.format()
    assert scrub(text) == hidden
    # As the journal has it: JSON, which stays JSON.
    assert json.loads(scrub(json.dumps({"a": text, "b": [text]}))) == {"a": hidden, "b": [hidden]}
    assert scrubbed({"a": text}) == {"a": hidden}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MY_PASSPHRASE", "AZURE_STORAGE_CONNECTION_STRING", "X_KEY",
     "PREFECT_API_AUTH_STRING", "WANDB_API_KEY", "DB_PWD", "AZURE_STORAGE_KEY", "GOOGLE_CREDENTIALS"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["pl anted/secr%et", 'pl"anted\\secret', "geheim-ß-wort", "/begins/with+a/slash="])
def test_a_secret_of_the_environment_is_hidden_in_texts_urls_and_json(monkeypatch, name, value):
    from urllib.parse import quote, quote_plus

    monkeypatch.setenv(name, value)
    for written in (value, json.dumps(value)[1:-1], quote(value, safe=""), quote_plus(value)):
        assert scrub(f"about {written} here") == "about *** here"


def test_a_path_to_a_secret_and_a_short_value_stay(monkeypatch, tmp_path):
    (tmp_path / "key").write_text("")
    for name, value in {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token-of-pod", "GOOGLE_APPLICATION_CREDENTIALS": "/etc/google.json",
        "SSH_AUTH_SOCK": "/tmp/ssh-agent-socket", "SSH_KEY": str(tmp_path / "key"), "RAY_AUTH_MODE": "token",
        "TOKENIZERS_PARALLELISM": "parallel-tokenizers", "AUTHOR": "somebody else", "OLDPWD": "/somewhere/else",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
        assert scrub(value) == value


def test_neither_errors_nor_printed_commands_nor_the_journal_show_a_password(home, monkeypatch, capsys):
    url = "nowhere://me:hunter2hunter2@host/x"
    with pytest.raises(EclectusError) as caught:
        Home.open(url)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SystemExit):
        main(["--home", url, "runs"])
    monkeypatch.setenv("ECLECTUS_HOME", url)
    assert "hunter2" not in capsys.readouterr().err + command("runs")
    parameters = {"sources": [url, f"https://h/x?sig={SECRET}"], "tokenizer": "https://me:hunter2@h/x"}
    with Journal(home.journal, "20260101-000000-abcdef") as journal:
        journal.event("run_started", flow="curate", parameters=parameters, packages={})
        journal.event("run_ended", state="failed", seconds=1.0, error=f"OSError: {url} is gone")
    rows = str(query("select parameters, error from runs", home))
    assert "hunter2" not in rows and SECRET not in rows and "is gone" in rows
    written = "".join(path.read_bytes().decode("latin-1") for path in home.journal.rglob("*") if path.is_file())
    assert "hunter2" not in written and SECRET not in written


def test_the_name_of_the_product_is_no_secret_whatever_it_is_used_for(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "eclectus")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minio-secret")
    assert scrub("/opt/eclectus and minio-secret") == "/opt/eclectus and ***"
