"""The fleet that ``callboard up`` starts without a file, and the commented file that ``callboard init`` writes."""

DEFAULT_FLEET = """\
# A Callboard fleet: one prefill engine and one decode engine, each on a core of its own.
#   callboard check {file}     validate it
#   callboard up {file}        start it
version = 1
name = "{name}"                        # a running fleet is found by name: callboard ps {name}

[listen]
http = "127.0.0.1:8000"                 # the OpenAI API; "0.0.0.0:8000" for every interface
# frontends = 2                         # processes that serve it, each on a core; by default one, beside the directory
# api_keys = "api-keys.txt"             # one bearer key per line; without it everybody may ask
# bus = "tcp://10.0.0.1:7000"           # by default "ipc", for this machine alone; beyond it takes keys
# keys = "keys"                         # the directory that callboard keys new made: the bus is encrypted
# silent = "5s"                         # a process that hangs for so long is cut off by the others
# stall = "30s"                         # a request whose client reads nothing for so long is cancelled

[models.smollm2-135m]                   # the table's name is the OpenAI model name
path = "embedded"                       # or a directory, a .gguf file, or a hub id such as "Qwen/Qwen3-0.6B"
# dtype = "auto"                        # auto | float32 | bfloat16
# max_model_len = 8192                  # by default what the model was made for

[defaults.kv]                           # one KV manager per device, made by itself
size = "1GiB"                           # of its pool; or a share of the memory: "20%"
# transport = "ucx"                     # by default the best there is between two managers: "shm" on one machine
# wire = "bfloat16"                     # pages over UCX rounded to bfloat16, or to a quarter: "float8_e4m3"
# verify = true                         # pages are held against their sender's digests before they are used
# lease = "10s"                         # how long a reservation waits for its pages
# tiers = [{{ kind = "disk", path = "cache", size = "8GiB" }}]  # keeps what pools have no room for; or kind = "host"

[[engine]]
name = "prefill"
roles = ["prefill"]                     # by default both roles
device = "cpu:0"                        # cpu:N is pinned to the N-th core; "cpu" uses all cores; cuda:0 is a GPU
# runner = "simulated"                  # computes nothing, answers nonsense at once: to try scripts
# model = "smollm2-135m"                # needed where there are several models
# count = 2                             # makes prefill-0 and prefill-1
# host = "b"                            # is started there: callboard join tcp://10.0.0.1:7000 {file} --host b
# block_size = 16                       # tokens per KV block; engines that hand over KV need not agree
# dtype = "bfloat16"                    # by default that of its model
# max_num_batched_tokens = 512          # the token budget of one step
# max_num_seqs = 64
# restart = {{ policy = "on-failure", backoff = "1s", max = 5 }}

[[engine]]
name = "decode"
roles = ["decode"]
device = "cpu:1"

[[router]]
name = "main"
script = "disaggregate"                 # a shipped script, or the path of your own
# options = {{ ratio = 0.2 }}             # keyword arguments of its route()
# deadline = "120s"                     # of one request
# max_queue = 256                       # requests in flight; more are refused with HTTP 429

# [[actor]]                             # an actor of your own
# name = "ping"
# class = "my_actors:Ping"              # module:Class, importable from this file's directory
# options = {{ greeting = "hello" }}      # its keyword arguments
"""


def default_fleet(*, name: str = "default", file: str = "fleet.toml") -> str:
    """Return the text of the default fleet file."""
    return DEFAULT_FLEET.format(name=name, file=file)
