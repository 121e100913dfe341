# lite-llm in a small image: one program on Debian's C library, without a package manager or shell.
#
#   docker build -t lite-llm .
#   docker run --rm lite-llm run "ls - list"
#   docker run -v lite-llm:/state -v ~/models:/models:ro -p 7450:7450/udp lite-llm \
#     coordinator --model /models/olmoe --listen 0.0.0.0:7450 --advertise HOST_IP:7450
#   docker cp CONTAINER:/state/worker.token .     # for workers
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked && strip target/release/lite-llm && mkdir /state

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/lite-llm /usr/local/bin/lite-llm
COPY --from=build --chown=nonroot:nonroot --chmod=700 /state /state
ENV LITE_LLM_STATE=/state
VOLUME /state
EXPOSE 7450/udp
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/lite-llm"]
CMD ["help"]
