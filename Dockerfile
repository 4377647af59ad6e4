# One image for server, Ray nodes, worker and jobs, so that their versions cannot differ.
FROM python:3.11.13-slim-bookworm
ENV PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 eclectus
WORKDIR /opt/eclectus
# PyTorch in a layer of its own: it is large and rarely changes.
COPY constraints constraints
RUN pip install --no-cache-dir torch==2.13.0 -c constraints/constraints.txt
COPY pyproject.toml README.md LICENSE prefect.yaml ./
COPY configs configs
COPY eclectus eclectus
COPY flows flows
COPY tasks tasks
COPY models models
COPY storage storage
RUN pip install --no-cache-dir '.[cluster]' -c constraints/constraints.txt \
    && pip install --no-cache-dir --no-deps --no-compile -r constraints/corpus.txt \
    && eclectus corpus data/corpus \
    && mkdir -p /home/eclectus/cache && chown -R eclectus:eclectus /home/eclectus /opt/eclectus
USER eclectus
