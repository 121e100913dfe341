"""Starts moto's S3 server, prints its URL and a user's keys, and ends with its standard input.

It has one bucket, "models", and checks the signature of every request."""

import json
import sys

import boto3
from moto import settings
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"


def client(name):
    keys = {"aws_access_key_id": "anybody", "aws_secret_access_key": "anything"}
    return boto3.client(name, endpoint_url=url, region_name="us-east-1", **keys)


client("s3").create_bucket(Bucket="models")
iam = client("iam")
iam.create_user(UserName="user")
allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
policy = {"Version": "2012-10-17", "Statement": [allowed]}
iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=json.dumps(policy))
key = iam.create_access_key(UserName="user")["AccessKey"]
# From now on, requests must be signed with that key.
settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
print(url, key["AccessKeyId"], key["SecretAccessKey"], flush=True)
sys.stdin.read()
