//! Spans that cross the wire: W3C trace context out of a span, and spans under a remote parent.

use lite_llm_transport::messages::TraceContext;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing::{Span, debug_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The context that a message sent within this span carries; all zero if nothing is traced.
pub fn context_of(span: &Span) -> TraceContext {
    if span.is_disabled() {
        return TraceContext::default();
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    TraceContext {
        trace_id: context.trace_id().to_bytes(),
        span_id: context.span_id().to_bytes(),
        flags: context.trace_flags().to_u8(),
    }
}

/// Puts a span under a parent of another process.
pub fn adopt(span: &Span, parent: TraceContext) {
    if span.is_disabled() || !parent.is_valid() {
        return;
    }
    let parent = SpanContext::new(
        TraceId::from_bytes(parent.trace_id),
        SpanId::from_bytes(parent.span_id),
        TraceFlags::new(parent.flags),
        true,
        TraceState::NONE,
    );
    // It fails where no exporter listens, and then there is nothing to put in order.
    let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
}

/// A span of work for a batch of another node.
pub fn remote_span(name: &'static str, parent: TraceContext, layer: u16, calls: usize) -> Span {
    let span = debug_span!("remote", otel.name = name, layer, calls);
    adopt(&span, parent);
    span
}
