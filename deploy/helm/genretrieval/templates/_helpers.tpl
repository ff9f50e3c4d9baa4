{{- define "genretrieval.name" -}}
{{- if contains "genretrieval" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-genretrieval" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "genretrieval.selector" -}}
app.kubernetes.io/name: genretrieval
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "genretrieval.labels" -}}
{{ include "genretrieval.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "genretrieval.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "genretrieval.bundles" -}}
/bundles{{ with .Values.bundles.path }}/{{ . }}{{ end }}
{{- end }}

{{- /* Secrets reach the process by its environment, which is not seen where command lines are. */}}
{{- define "genretrieval.env" -}}
{{- range $name, $from := dict "GENRETRIEVAL_ADMIN_STORE" .Values.adminStore "GENRETRIEVAL_HISTORIES" .Values.histories "GENRETRIEVAL_LOG_KEY" .Values.servedLog }}
{{- with $from.existingSecret }}
- name: {{ $name }}
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $from.key }}}}
{{- end }}
{{- end }}
{{- with .Values.server.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "genretrieval.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "genretrieval.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What cannot work is refused here, before a pod says so. */}}
{{- define "genretrieval.check" -}}
{{- if not (or .Values.bundles.volume .Values.bundles.fetch) }}
{{- fail "there is no bundle to serve: give bundles.volume, or bundles.fetch to fill an empty one" }}
{{- end }}
{{- if not (or .Values.adminStore.existingSecret .Values.auth.jwt.issuer .Values.tls.clientCa .Values.auth.insecure) }}
{{- fail "nobody could be told apart: give adminStore.existingSecret, auth.jwt or tls.clientCa, or allow it with auth.insecure" }}
{{- end }}
{{- with .Values.bundles }}
{{- if and .alias (not $.Values.adminStore.existingSecret) }}
{{- fail "bundles.alias is part of the admin state: give adminStore.existingSecret" }}
{{- end }}
{{- if and .first (not (and .alias .volume)) }}
{{- fail "bundles.first is the bundle of bundles.alias on bundles.volume: give both" }}
{{- end }}
{{- end }}
{{- if and .Values.tls.clientCa (not .Values.tls.existingSecret) }}
{{- fail "tls.clientCa needs tls.existingSecret, which holds ca.crt" }}
{{- end }}
{{- if and .Values.autoscaling.enabled (not (or .Values.autoscaling.inFlightRows .Values.autoscaling.cpuPercent)) }}
{{- fail "autoscaling has nothing to go by: give autoscaling.inFlightRows, autoscaling.cpuPercent or both" }}
{{- end }}
{{- end }}

{{- define "genretrieval.args" -}}
{{- $server := .Values.server -}}
- serve
{{- if .Values.bundles.alias }}
- --bundles={{ include "genretrieval.bundles" . }}
- --alias={{ .Values.bundles.alias }}
{{- else }}
- --bundle={{ include "genretrieval.bundles" . }}
{{- end }}
- --host=0.0.0.0
- --http-port=8080
- --grpc-port=8081
- --probe-port=8083
- --drain-delay={{ $server.drainDelaySeconds }}
- --drain-seconds={{ $server.drainSeconds }}
{{- if .Values.adminStore.existingSecret }}
- --admin-port=8082
{{- if .Values.auth.required }}
- --auth
{{- end }}
{{- end }}
{{- if .Values.auth.insecure }}
- --insecure
{{- end }}
{{- with .Values.auth.jwt }}
{{- if .issuer }}
- --jwt-issuer={{ .issuer }}
- --jwt-audience={{ .audience }}
- --jwt-jwks-url={{ .jwksUrl }}
{{- end }}
{{- end }}
{{- if .Values.catalogueChanges.volume }}
- --catalogue-changes=/changes
{{- end }}
{{- if .Values.servedLog.volume }}
- --log-folder=/log
{{- end }}
{{- if .Values.tls.existingSecret }}
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- if .Values.tls.clientCa }}
- --tls-client-ca=/tls/ca.crt
{{- end }}
{{- end }}
{{- range $name, $value := $server.options }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $name }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end }}
