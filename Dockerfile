# One image for server, Ray nodes, worker and deploy job, so that their versions cannot differ.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 eclectus
WORKDIR /opt/eclectus
COPY pyproject.toml README.md ./
COPY constraints constraints
COPY flows flows
COPY tasks tasks
COPY models models
COPY storage storage
COPY configs configs
COPY prefect.yaml ./
RUN pip install --no-cache-dir torch==2.13.0 -c constraints/constraints.txt \
    && pip install --no-cache-dir '.[cluster]' -c constraints/constraints.txt \
    && pip install --no-cache-dir --no-deps --no-compile -r constraints/corpus.txt \
    && eclectus corpus data/corpus \
    && mkdir -p /home/eclectus/home && chown -R eclectus:eclectus /home/eclectus /opt/eclectus
USER eclectus
