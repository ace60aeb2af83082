"""A real RTSP server, GStreamer's, in a process of its own under the system's Python, which has its bindings: started
by `bench.rtsp`, for tests and measurements.

    /usr/bin/python3 rtsp_server.py PORT LAUNCH     prints the port it is bound to, then serves until it is killed

One pipeline serves all clients, as in a camera. LAUNCH is what gst-launch takes, with a payloader named pay0.
"""

import sys


def serve(port: str, launch: str) -> None:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(f"( {launch} )")
    factory.set_shared(True)
    server.get_mount_points().add_factory("/camera", factory)
    if not server.attach(None):
        raise SystemExit(f"cannot listen on port {port}")
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
