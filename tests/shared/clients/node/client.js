// A camera and a consumer in Node.js, made from the .proto files alone: compresses a picture and waits for what is found.
//
//   node client.js PROTO_DIR EDGE CLOUD PICTURE     prints one line of JSON: the receipt's and the event's main fields
"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const [protoDir, edgeAddress, cloudAddress, picture] = process.argv.slice(2);
const definition = protoLoader.loadSync(["sightline/v1/edge.proto", "sightline/v1/detection.proto"], {
  includeDirs: [protoDir],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { sightline } = grpc.loadPackageDefinition(definition);
const plaintext = grpc.credentials.createInsecure();
const edge = new sightline.v1.EdgeService(edgeAddress, plaintext);
const cloud = new sightline.v1.DetectionService(cloudAddress, plaintext);

function compress() {
  const request = {
    camera_id: "node",
    encoded: fs.readFileSync(picture),
    options: { quality: 6, delivery: "DELIVERY_SPOOLED" },
  };
  return new Promise((resolve, reject) => {
    const deadline = { deadline: Date.now() + 60000 };
    edge.Compress(request, deadline, (error, response) => (error ? reject(error) : resolve(response.receipt)));
  });
}

async function main() {
  const subscription = cloud.Subscribe({ position: "START_POSITION_END", filter: { camera_ids: ["node"] } });
  let receipt = null;
  for await (const response of subscription) {
    if (response.message === "progress" && receipt === null && response.progress.caught_up) {
      receipt = await compress(); // the subscription stands: nothing that comes now can be missed
    }
    if (response.message === "event" && response.event.frame.seq === receipt.frame.seq) {
      const event = response.event;
      const found = event.results.flatMap((result) => result.detections);
      console.log(
        JSON.stringify({
          state: receipt.state,
          frame: event.frame,
          coded_bytes: receipt.coded_bytes,
          outcome: event.outcome,
          found: found.map(({ label, score, box }) => ({ label, score, box })),
        }),
      );
      break;
    }
  }
  subscription.cancel();
  edge.close();
  cloud.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
